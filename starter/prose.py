"""Running text and small talk for the starter model, made from sentences of our own."""

from __future__ import annotations

import random

from starter import words as w

TALK = [
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hello! How can I help you?"),
    ("你好！", "你好！有什么可以帮你的？"),
    ("您好", "你好！有什么可以帮你的？"),
    ("Who are you?", "I am the starter model of Lorakeet, a small model to learn with."),
    ("What are you?", "I am the starter model of Lorakeet, a small model to learn with."),
    ("你是谁？", "我是 Lorakeet 的入门模型，一个用来学习的小模型。"),
    ("你叫什么名字？", "我是 Lorakeet 的入门模型，一个用来学习的小模型。"),
    ("Thank you.", "You are welcome."),
    ("谢谢。", "不客气。"),
    ("Goodbye!", "Goodbye, and good luck!"),
    ("再见！", "再见，祝你好运！"),
    (
        "What can you do?",
        "I can translate words, compare numbers, sort things and answer short questions.",
    ),
    ("你会做什么？", "我会翻译词语、比较数字、给事物分类，还能回答简短的问题。"),
]


def english_story(rng: random.Random) -> str:
    """Four to six plain sentences about a person, a thing and a day."""
    name, friend = rng.sample(w.NAMES, 2)
    city, day, month = rng.choice(w.CITIES), rng.choice(w.DAYS), rng.choice(w.MONTHS)
    animal, food = (
        rng.choice([n for n, v in w.NOUNS.items() if v[1] == k]) for k in ("animal", "food")
    )
    vehicle, colour = (
        rng.choice([n for n, v in w.NOUNS.items() if v[1] == k]) for k in ("vehicle", "colour")
    )
    good = rng.choice(w.GOOD)
    sentences = [
        f"On a {day} in {month}, {name} went to {city} by {vehicle}.",
        f"The {vehicle} was {colour}, and the trip was {good}.",
        f"In {city}, {name} met {friend}, who had a {animal}.",
        f"They ate {food} together and talked until it was late.",
        f"The {animal} was {rng.choice(list(w.OPPOSITES))} and liked the {food} too.",
        f"At the end of the day {name} said goodbye to {friend} and went home.",
    ]
    return " ".join(sentences[: rng.randint(4, 6)])


def chinese_story(rng: random.Random) -> str:
    """The same in Chinese."""
    name, friend = rng.sample(w.CHINESE_NAMES, 2)
    city, day, month = (
        rng.choice(w.CHINESE_CITIES),
        rng.choice(w.CHINESE_DAYS),
        rng.choice(w.CHINESE_MONTHS),
    )
    pick = lambda k: rng.choice([v[0] for v in w.NOUNS.values() if v[1] == k])  # noqa: E731
    animal, food, vehicle = pick("animal"), pick("food"), pick("vehicle")
    sentences = [
        f"{month}的一个{day}，{name}坐{vehicle}去了{city}。",
        f"一路上天气{rng.choice(w.CHINESE_GOOD)}。",
        f"在{city}，{name}见到了{friend}，{friend}有一只{animal}。",
        f"他们一起吃了{food}，聊到很晚。",
        f"{animal}也喜欢{food}。",
        f"最后{name}和{friend}说再见，回家去了。",
    ]
    return "".join(sentences[: rng.randint(4, 6)])
