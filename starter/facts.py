"""The quickstart's domain: the cargo rules of Kestrel Bay harbour, which does not exist.

One table of rules is the source of the handbook (PDF), the harbour page (HTML), the
Chinese notice (Markdown), the training questions and the held-out questions.  A rule
speaks of a kind of cargo; a question asks of one thing.  The held-out questions ask of
things that no training question names, so the rules must be applied, not recited.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from starter.words import KINDS, NOUNS

HELD_OUT_ONE_IN = 4


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Where one kind of cargo goes: English and Chinese values."""

    kind: str
    pier: str
    day: str
    chinese_day: str
    clerk: str
    chinese_clerk: str
    flag: str
    chinese_flag: str

    @property
    def chinese_kind(self) -> str:
        """The kind in Chinese."""
        return KINDS[self.kind][0]


_TABLE = """
animal|41|Monday|星期一|Clara|小军|red|红色
fruit|72|Tuesday|星期二|Henry|小雪|blue|蓝色
colour|15|Wednesday|星期三|Olga|小刚|green|绿色
tool|86|Thursday|星期四|Felix|小美|black|黑色
vehicle|23|Friday|星期五|Iris|小强|white|白色
food|94|Saturday|星期六|Leo|小华|yellow|黄色
"""

RULES = {
    f[0]: Rule(
        kind=f[0], pier=f[1], day=f[2], chinese_day=f[3], clerk=f[4], chinese_clerk=f[5],
        flag=f[6], chinese_flag=f[7],
    )
    for f in (line.split("|") for line in _TABLE.strip().splitlines())
}  # fmt: skip

ENGLISH_QUESTIONS = {
    "pier": ["Which pier takes {}?", "At which pier is {} loaded?", "Name the pier for {}."],
    "day": ["On which day does {} sail?", "When does {} sail?", "Name the sailing day of {}."],
    "clerk": ["Who signs for {}?", "Which clerk signs for {}?", "Name the clerk for {}."],
    "flag": ["Which flag flies over {}?", "What flag does {} sail under?", "Name the flag for {}."],
}
CHINESE_QUESTIONS = {
    "pier": ["{}在几号码头装船？", "{}去哪个码头？", "请说出{}的码头。"],
    "chinese_day": ["{}哪天开船？", "{}在星期几开船？", "请说出{}的开船日。"],
    "chinese_clerk": ["{}由谁签收？", "谁负责签收{}？", "请说出{}的签收人。"],
    "chinese_flag": ["{}挂什么旗？", "运{}的船挂什么颜色的旗？", "请说出{}的旗。"],
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A rule applied to one thing; a held-out thing is in no training question."""

    question: str
    answer: str
    attribute: str
    is_held_out: bool


def is_held_out_thing(english: str) -> bool:
    """Whether questions about a thing are kept for the test."""
    digest = hashlib.blake2b(english.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def asked_facts() -> Iterator[Asked]:
    """Every rule applied to every thing: in all phrasings, or held out in one of them."""
    for number, (english, (chinese, kind, _)) in enumerate(NOUNS.items()):
        is_held_out = is_held_out_thing(english)
        for questions, name in ((ENGLISH_QUESTIONS, english), (CHINESE_QUESTIONS, chinese)):
            for place, (attribute, phrasings) in enumerate(questions.items()):
                chosen = (number + place) % len(phrasings)
                for phrasing in phrasings[chosen : chosen + 1] if is_held_out else phrasings:
                    yield Asked(
                        question=phrasing.format(name), answer=getattr(RULES[kind], attribute),
                        attribute=attribute.removeprefix("chinese_"), is_held_out=is_held_out,
                    )  # fmt: skip


def english_sentences(rule: Rule) -> str:
    """What the handbook says of a kind of cargo."""
    return (
        f"Every {rule.kind} is loaded at pier {rule.pier} and sails on {rule.day}. "
        f"{rule.clerk} signs for it, and the ship sails under the {rule.flag} flag."
    )


def chinese_sentences(rule: Rule) -> str:
    """What the Chinese notice says of a kind of cargo."""
    return (
        f"{rule.chinese_kind}在{rule.pier}号码头装船，{rule.chinese_day}开船。"
        f"由{rule.chinese_clerk}签收，船挂{rule.chinese_flag}的旗。"
    )
