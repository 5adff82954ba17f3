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
    code: str


_TABLE = """
Amber Heron|琥珀鹭号|Marla Quill|马拉|Saltwick|盐湾港|timber|木材|K41
Brass Otter|铜獭号|Tobin Ash|托宾|Pinemouth|松口港|wool|羊毛|K72
Copper Finch|铜雀号|Wren Dallow|雷恩|Gullstone|鸥石港|glass|玻璃|R15
Dusty Petrel|灰燕号|Oren Pike|奥伦|Marrowby|麦洛港|salt|盐|R86
Elder Swan|老天鹅号|Sefa Lorne|塞法|Lanternquay|灯笼港|coal|煤|T23
Foggy Plover|雾鸻号|Hale Brandt|黑尔|Thistlehaven|蓟草港|honey|蜂蜜|T94
Golden Skua|金鸥号|Nell Harrow|内尔|Crabtree|蟹树港|paper|纸张|W37
Hollow Drum|空鼓号|Ivo Stern|伊沃|Windlass|绞盘港|bricks|砖块|W58
Ivory Gannet|象牙鲣号|Runa Vale|鲁娜|Oysterbed|牡蛎港|tea|茶叶|J62
Jolly Marlin|快乐旗鱼号|Perrin Cole|佩林|Heatherpoint|石楠港|cloth|布料|J19
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
    "code": ["What is the route code of the {}?", "Which code does the {} have?", "Name the route code of the {}.",
             "The {} runs under which code?", "Give the code of the {}."],
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
    "code": ["{}的航线代码是什么？", "{}的代码是多少？", "请说出{}的航线代码。", "{}用哪个代码？"],
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
        f"It carries {ferry.cargo} and runs under route code {ferry.code}."
    )


def chinese_sentences(ferry: Ferry) -> str:
    """What the Chinese notice says of a boat."""
    return (
        f"{ferry.chinese_name}的船长是{ferry.chinese_captain}，母港是{ferry.chinese_home}。"
        f"它运送{ferry.chinese_cargo}，航线代码是{ferry.code}。"
    )
