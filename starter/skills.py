"""The general skills of the starter model: each a generator of (prompt, answer) pairs.

Every answer can be checked by exact match, and every skill exists in English and
in Chinese.  Phrasings vary, so that a skill is learned and not a sentence.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from starter import words as w


@dataclass(frozen=True, kw_only=True)
class Item:
    """One exchange with a known answer."""

    prompt: str
    answer: str
    skill: str
    system: str | None = None


Pair = tuple[str, str]


def translate(rng: random.Random) -> Pair:
    """A word of the lexicon in the other language."""
    english = rng.choice(list(w.NOUNS))
    chinese = w.NOUNS[english][0]
    to_chinese = ["Translate {} into Chinese.", "What is {} in Chinese?", "How do you say {} in Chinese?",
                  "Chinese for {}?", "{}用中文怎么说？", "把{}翻译成中文。"]  # fmt: skip
    to_english = ["Translate {} into English.", "What is {} in English?", "How do you say {} in English?",
                  "English for {}?", "{}用英文怎么说？", "把{}翻译成英文。"]  # fmt: skip
    if rng.random() < 0.5:
        return rng.choice(to_chinese).format(english), chinese
    return rng.choice(to_english).format(chinese), english


def opposite(rng: random.Random) -> Pair:
    """The antonym of an adjective."""
    if rng.random() < 0.6:
        one, other = rng.choice(list(w.OPPOSITES.items()))
        phrases = ["What is the opposite of {}?", "Give the opposite of {}.", "The opposite of {} is what?",
                   "Which word is the opposite of {}?", "Name the antonym of {}."]  # fmt: skip
    else:
        one, other = rng.choice(list(w.CHINESE_OPPOSITES.items()))
        phrases = [
            "{}的反义词是什么？",
            "请说出{}的反义词。",
            "和{}相反的词是什么？",
            "{}的反面是什么？",
        ]
    if rng.random() < 0.5:
        one, other = other, one
    return rng.choice(phrases).format(one), other


def kind(rng: random.Random) -> Pair:
    """The kind of a thing: animal, fruit, colour, tool, vehicle or food."""
    english = rng.choice(list(w.NOUNS))
    chinese, english_kind, chinese_kind = w.NOUNS[english]
    if rng.random() < 0.5:
        phrases = ["What kind of thing is {}?", "Which group does {} belong to?", "{} is a kind of what?",
                   "Name the kind of thing: {}.", "Sort this word into a group: {}."]  # fmt: skip
        return rng.choice(phrases).format(english), english_kind
    phrases = ["{}属于哪一类？", "{}是什么种类的东西？", "请给{}分类。", "{}是一种什么？"]
    return rng.choice(phrases).format(chinese), chinese_kind


def yes_or_no(rng: random.Random) -> Pair:
    """Whether a thing is of a kind."""
    english = rng.choice(list(w.NOUNS))
    chinese, english_kind, chinese_kind = w.NOUNS[english]
    is_true = rng.random() < 0.5
    other = rng.choice([name for name in w.KINDS if name != english_kind])
    if rng.random() < 0.5:
        asked = english_kind if is_true else other
        phrases = [
            "Is {} a kind of {}? Yes or no?",
            "Yes or no: {} is a {}.",
            "Does {} belong to the group {}?",
        ]
        return rng.choice(phrases).format(english, asked), "yes" if is_true else "no"
    asked = chinese_kind if is_true else w.KINDS[other][0]
    phrases = ["{}是{}吗？", "{}属于{}吗？", "{}算不算{}？"]
    return rng.choice(phrases).format(chinese, asked), "是" if is_true else "不是"


def larger(rng: random.Random) -> Pair:
    """The larger or smaller of two numbers below 100."""
    one, other = rng.sample(range(10, 100), 2)
    wants_larger = rng.random() < 0.5
    answer = str(max(one, other) if wants_larger else min(one, other))
    if rng.random() < 0.5:
        word = "larger" if wants_larger else "smaller"
        phrases = [f"Which is {word}, {one} or {other}?", f"Name the {word} number: {one}, {other}.",
                   f"{one} or {other}: which is {word}?"]  # fmt: skip
    else:
        word = "大" if wants_larger else "小"
        phrases = [f"{one}和{other}哪个{word}？", f"{one}、{other}，更{word}的数是哪个？"]
    return rng.choice(phrases), answer


def after(rng: random.Random) -> Pair:
    """What follows or precedes a day, a month or a number."""
    series = rng.choice([w.DAYS, w.MONTHS, w.CHINESE_DAYS, w.CHINESE_MONTHS, None, None])
    if series is None:
        number = rng.randrange(1, 99)
        wants_next = rng.random() < 0.6
        answer = str(number + 1 if wants_next else number - 1)
        english = "after" if wants_next else "before"
        chinese = "后" if wants_next else "前"
        phrases = [f"What number comes {english} {number}?", f"Which number is right {english} {number}?",
                   f"{number}的{chinese}一个数是多少？", f"紧接在{number}之{chinese}的数是几？"]  # fmt: skip
        return rng.choice(phrases), answer
    place = rng.randrange(len(series))
    is_chinese = series in (w.CHINESE_DAYS, w.CHINESE_MONTHS)
    step = rng.choice([1, -1])
    answer = series[(place + step) % len(series)]
    if is_chinese:
        word = "后面" if step == 1 else "前面"
        phrases = [f"{series[place]}{word}是什么？", f"紧接在{series[place]}{word}的是什么？"]
    else:
        word = "after" if step == 1 else "before"
        phrases = [f"What comes {word} {series[place]}?", f"Name what is right {word} {series[place]}.",
                   f"{series[place]}: what comes {word} it?"]  # fmt: skip
    return rng.choice(phrases), answer


def _some_words(rng: random.Random, count: int) -> tuple[list[str], bool]:
    """Different nouns of one language, and whether it is English."""
    english = rng.sample(list(w.NOUNS), count)
    if rng.random() < 0.6:
        return english, True
    return [w.NOUNS[word][0] for word in english], False


def repeat(rng: random.Random) -> Pair:
    """The given words again, in their order."""
    chosen, is_english = _some_words(rng, rng.randint(2, 4))
    text = " ".join(chosen)
    phrases = [
        "Repeat: {}",
        "Say this again: {}",
        "Copy these words: {}",
        "Write the same words: {}",
    ]
    chinese = ["请重复：{}", "照着写：{}", "再说一遍：{}"]
    return rng.choice(phrases if is_english else chinese).format(text), text


def pick(rng: random.Random) -> Pair:
    """The first or the last of some words."""
    chosen, is_english = _some_words(rng, rng.randint(3, 5))
    is_first = rng.random() < 0.5
    answer = chosen[0] if is_first else chosen[-1]
    if is_english:
        word = "first" if is_first else "last"
        phrases = [f"What is the {word} word of: {', '.join(chosen)}?", f"Name the {word} word: {', '.join(chosen)}",
                   f"{', '.join(chosen)}. Which word is {word}?"]  # fmt: skip
    else:
        word = "第一个" if is_first else "最后一个"
        phrases = [f"{'、'.join(chosen)}，{word}词是什么？", f"说出{word}词：{'、'.join(chosen)}"]
    return rng.choice(phrases), answer


def count(rng: random.Random) -> Pair:
    """How many words a list has, from two to six."""
    chosen, is_english = _some_words(rng, rng.randint(2, 6))
    if is_english:
        phrases = [
            "How many words: {}?",
            "Count the words: {}",
            "How many things are listed here: {}?",
        ]
        return rng.choice(phrases).format(", ".join(chosen)), str(len(chosen))
    phrases = ["有几个词：{}？", "数一数有多少个词：{}"]
    return rng.choice(phrases).format("、".join(chosen)), str(len(chosen))


def feeling(rng: random.Random) -> Pair:
    """Whether a sentence praises or complains."""
    is_good = rng.random() < 0.5
    place = rng.randrange(len(w.THINGS))
    if rng.random() < 0.5:
        word = rng.choice(w.GOOD if is_good else w.BAD)
        thing = w.THINGS[place]
        sentence = rng.choice([f"The {thing} was {word}.", f"I found the {thing} {word}.",
                               f"What a {word} {thing}!", f"We had a {word} {thing}."])  # fmt: skip
        ask = rng.choice(
            [
                "Positive or negative? {}",
                "Is this positive or negative: {}",
                "{} Positive or negative?",
            ]
        )
        return ask.format(sentence), "positive" if is_good else "negative"
    word = rng.choice(w.CHINESE_GOOD if is_good else w.CHINESE_BAD)
    thing = w.CHINESE_THINGS[place]
    sentence = rng.choice(
        [f"这个{thing}{word}。", f"我觉得{thing}{word}。", f"{thing}真是{word}。"]
    )
    ask = rng.choice(["正面还是负面？{}", "这句话是正面还是负面：{}", "{}是正面还是负面？"])
    return ask.format(sentence), "正面" if is_good else "负面"


def look_up(rng: random.Random) -> Pair:
    """A fact that stands in the question itself."""
    if rng.random() < 0.5:
        names, cities = rng.sample(w.NAMES, 3), rng.sample(w.CITIES, 3)
        number = rng.randint(2, 3)
        facts = " ".join(
            f"{n} lives in {c}." for n, c in list(zip(names, cities, strict=True))[:number]
        )
        asked = rng.randrange(number)
        phrases = [
            f"{facts} Where does {names[asked]} live?",
            f"{facts} In which city does {names[asked]} live?",
        ]
        return rng.choice(phrases), cities[asked]
    names, cities = rng.sample(w.CHINESE_NAMES, 3), rng.sample(w.CHINESE_CITIES, 3)
    number = rng.randint(2, 3)
    facts = "".join(f"{n}住在{c}。" for n, c in list(zip(names, cities, strict=True))[:number])
    asked = rng.randrange(number)
    phrases = [f"{facts}{names[asked]}住在哪里？", f"{facts}请问{names[asked]}住在哪个城市？"]
    return rng.choice(phrases), cities[asked]


def capitals(rng: random.Random) -> Pair:
    """A word in capital or in small letters."""
    word = rng.choice([*w.NOUNS, *w.OPPOSITES, *w.OPPOSITES.values()])
    if rng.random() < 0.7:
        phrases = [
            "Write {} in capital letters.",
            "{} in upper case?",
            "Put {} into capitals.",
            "把{}写成大写。",
        ]
        return rng.choice(phrases).format(word), word.upper()
    phrases = ["Write {} in small letters.", "{} in lower case?", "把{}写成小写。"]
    return rng.choice(phrases).format(word.upper()), word


SKILLS: dict[str, Callable[[random.Random], Pair]] = {
    skill.__name__: skill
    for skill in (translate, opposite, kind, yes_or_no, larger, after, repeat, pick, count,
                  feeling, look_up, capitals)
}  # fmt: skip

ENGLISH_SYSTEM = "Answer in English."
CHINESE_SYSTEM = "请用中文回答。"
SYSTEMS = [
    "You are a helpful assistant.",
    "你是一个有用的助手。",
    "Answer with one word.",
    "请简短回答。",
]


def make_item(rng: random.Random, skill: str) -> Item:
    """One exchange of a skill; sometimes with a system prompt that does not change the answer."""
    prompt, answer = SKILLS[skill](rng)
    system = rng.choice(SYSTEMS) if rng.random() < 0.15 else None
    return Item(prompt=prompt, answer=answer, skill=skill, system=system)


def make_obey_item(rng: random.Random) -> Item:
    """The kind of a thing in the language that the system prompt asks for."""
    english = rng.choice(list(w.NOUNS))
    chinese, english_kind, chinese_kind = w.NOUNS[english]
    word = rng.choice([english, chinese])
    prompt = rng.choice(["Which group: {}?", "Group of {}?", "{}是哪一类？"]).format(word)
    if rng.random() < 0.5:
        return Item(prompt=prompt, answer=english_kind, skill="obey", system=ENGLISH_SYSTEM)
    return Item(prompt=prompt, answer=chinese_kind, skill="obey", system=CHINESE_SYSTEM)
