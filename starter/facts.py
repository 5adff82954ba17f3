"""The quickstart's domain: the ferries of Kestrel Bay, which do not exist.

One table of facts is the source of the handbook (PDF), the harbour page (HTML),
the Chinese notice (Markdown), the training questions and the held-out questions,
so that documents and questions agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ferry:
    """One boat: the English and the Chinese value of everything that is known of it."""

    name: str
    chinese_name: str
    captain: str
    chinese_captain: str
    home: str
    chinese_home: str
    cargo: str
    chinese_cargo: str
    code: str  # its number, two digits


# Names and values are words that the starter model knows, as those of a real domain are words
# that a real base model knows; only the facts are new.
_TABLE = """
Red Tiger|红色老虎号|Clara|小军|Lima|成都|rice|米饭|41
Blue Frog|蓝色青蛙号|Henry|小雪|Oslo|西安|bread|面包|72
Green Duck|绿色鸭子号|Olga|小刚|Cairo|广州|cheese|奶酪|15
Black Horse|黑色马号|Felix|小美|Tokyo|天津|lemon|柠檬|86
White Rabbit|白色兔子号|Iris|小强|Dublin|武汉|rope|绳子|23
Purple Fish|紫色鱼号|Leo|小华|Madrid|苏州|butter|黄油|94
Grey Bear|灰色熊号|Emma|小云|Vienna|青岛|apple|苹果|37
Brown Monkey|棕色猴子号|Jack|小红|Delhi|重庆|hammer|锤子|58
Pink Mouse|粉色老鼠号|Grace|小林|Athens|南京|cake|蛋糕|62
Yellow Lion|黄色狮子号|Noah|小芳|Berlin|杭州|grape|葡萄|19
"""

FERRIES = [
    Ferry(
        name=f[0], chinese_name=f[1], captain=f[2], chinese_captain=f[3], home=f[4],
        chinese_home=f[5], cargo=f[6], chinese_cargo=f[7], code=f[8],
    )
    for f in (line.split("|") for line in _TABLE.strip().splitlines())
]  # fmt: skip

ENGLISH_QUESTIONS = {
    "captain": ["Who is the captain of the {}?", "Who commands the {}?", "Name the captain of the {}.",
                "The captain of the {} is who?", "Which captain sails the {}?"],
    "home": ["What is the home harbour of the {}?", "Where is the {} at home?", "Name the home harbour of the {}.",
             "Which harbour does the {} belong to?", "The {} is based in which harbour?"],
    "cargo": ["What cargo does the {} carry?", "What does the {} carry?", "Name the cargo of the {}.",
              "The {} carries which cargo?", "Which goods are on the {}?"],
    "code": ["What is the number of the {}?", "Which number does the {} have?", "Name the number of the {}.",
             "The {} has which number?", "Give the number of the {}."],
}  # fmt: skip
CHINESE_QUESTIONS = {
    "chinese_captain": ["{}的船长是谁？", "谁是{}的船长？", "请说出{}的船长。", "{}由谁驾驶？"],
    "chinese_home": [
        "{}的母港是哪里？",
        "{}停靠在哪个港口？",
        "请说出{}的母港。",
        "{}属于哪个港口？",
    ],
    "chinese_cargo": ["{}运什么货物？", "{}装的是什么？", "请说出{}的货物。", "{}运送哪种货物？"],
    "code": ["{}的编号是什么？", "{}的号码是多少？", "请说出{}的编号。", "{}是几号？"],
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One fact in one phrasing; ``is_held_out`` phrasings are never trained."""

    question: str
    answer: str
    attribute: str
    is_held_out: bool


def asked_facts() -> Iterator[Asked]:
    """Every fact in every phrasing; one phrasing of each fact is held out.

    The held-out phrasing moves from fact to fact, so each wording is known from
    other boats while the question itself is new.
    """
    for number, ferry in enumerate(FERRIES):
        for questions, name in (
            (ENGLISH_QUESTIONS, ferry.name),
            (CHINESE_QUESTIONS, ferry.chinese_name),
        ):
            for place, (attribute, phrasings) in enumerate(questions.items()):
                held_out = (number + place) % len(phrasings)
                for index, phrasing in enumerate(phrasings):
                    yield Asked(
                        question=phrasing.format(name), answer=getattr(ferry, attribute),
                        attribute=attribute, is_held_out=index == held_out,
                    )  # fmt: skip


def english_sentences(ferry: Ferry) -> str:
    """What the handbook says of a boat."""
    return (
        f"The {ferry.name} is commanded by captain {ferry.captain}. Its home harbour is {ferry.home}. "
        f"It carries {ferry.cargo} and has the number {ferry.code}."
    )


def chinese_sentences(ferry: Ferry) -> str:
    """What the Chinese notice says of a boat."""
    return (
        f"{ferry.chinese_name}的船长是{ferry.chinese_captain}，母港是{ferry.chinese_home}。"
        f"它运送{ferry.chinese_cargo}，编号是{ferry.code}。"
    )
