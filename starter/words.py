"""The lexicon of the starter model: English and Chinese words with their meanings.

Each noun has a kind, so that translating, naming the kind and answering yes or no
all follow from one table.
"""

from __future__ import annotations

KINDS = {
    "animal": ("动物", "cat 猫, dog 狗, horse 马, cow 牛, sheep 羊, pig 猪, duck 鸭子, fish 鱼, "
               "bird 鸟, rabbit 兔子, tiger 老虎, lion 狮子, monkey 猴子, bear 熊, mouse 老鼠, frog 青蛙"),
    "fruit": ("水果", "apple 苹果, pear 梨, grape 葡萄, lemon 柠檬, peach 桃子, banana 香蕉, "
              "mango 芒果, cherry 樱桃, melon 瓜, plum 李子"),
    "colour": ("颜色", "red 红色, blue 蓝色, green 绿色, yellow 黄色, black 黑色, white 白色, "
               "purple 紫色, grey 灰色, brown 棕色, pink 粉色"),
    "tool": ("工具", "hammer 锤子, saw 锯子, drill 钻头, knife 刀, brush 刷子, ladder 梯子, "
             "rope 绳子, needle 针, shovel 铲子, pen 笔"),
    "vehicle": ("交通工具", "car 汽车, bus 公共汽车, train 火车, ship 船, plane 飞机, bicycle 自行车, "
                "truck 卡车, taxi 出租车"),
    "food": ("食物", "bread 面包, rice 米饭, soup 汤, cheese 奶酪, noodles 面条, cake 蛋糕, "
             "egg 鸡蛋, butter 黄油"),
}  # fmt: skip

NOUNS = {
    english: (chinese, kind, chinese_kind)
    for kind, (chinese_kind, listing) in KINDS.items()
    for english, chinese in (entry.split() for entry in listing.split(", "))
}

OPPOSITES = dict(
    entry.split("/")
    for entry in (
        "hot/cold big/small tall/short fast/slow old/young happy/sad light/dark full/empty "
        "open/closed early/late hard/soft wet/dry clean/dirty rich/poor strong/weak near/far "
        "high/low loud/quiet thick/thin wide/narrow deep/shallow first/last left/right up/down"
    ).split()
)
CHINESE_OPPOSITES = dict(
    entry.split("/")
    for entry in (
        "热/冷 大/小 高/矮 快/慢 老/年轻 高兴/难过 亮/暗 满/空 开/关 早/晚 硬/软 湿/干 "
        "干净/脏 富/穷 强/弱 近/远 吵/静 厚/薄 宽/窄 深/浅 左/右 上/下"
    ).split()
)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CHINESE_DAYS = [f"星期{day}" for day in "一二三四五六日"]
MONTHS = (
    "January February March April May June July August September October November December"
).split()
CHINESE_MONTHS = [f"{month}月" for month in "一 二 三 四 五 六 七 八 九 十 十一 十二".split()]

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul".split()
CHINESE_NAMES = "小明 小红 小华 小丽 小刚 小芳 小强 小美 小军 小云 小林 小雪".split()
CITIES = "Paris Oslo Rome Cairo Lima Delhi Tokyo Berlin Madrid Dublin Vienna Athens".split()
CHINESE_CITIES = "北京 上海 广州 南京 成都 西安 杭州 武汉 天津 重庆 苏州 青岛".split()

GOOD = "wonderful great lovely excellent brilliant delightful perfect superb".split()
BAD = "terrible awful boring horrible dreadful disappointing poor nasty".split()
CHINESE_GOOD = "很好 精彩 出色 令人高兴 完美 美好 优秀 棒极了".split()
CHINESE_BAD = "很差 糟糕 无聊 令人失望 可怕 难受 劣质 烂透了".split()
THINGS = "film meal book hotel song trip concert game lesson garden".split()
CHINESE_THINGS = "电影 饭菜 书 酒店 歌曲 旅行 音乐会 游戏 课程 花园".split()
