"""Writes the starter model's corpus: ``python -m starter.build_corpus --out build/starter``.

Held-out items are chosen by a hash of the prompt, so the split never depends on
the order of generation and no held-out prompt can be a training prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starter.prose import TALK, chinese_story, english_story
from starter.skills import SKILLS, Item, make_item, make_obey_item

HELD_OUT_ONE_IN = 12
HELD_OUT_PER_SKILL = 20


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out twelfth."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def to_messages(item: Item, *, with_answer: bool) -> list[dict[str, str]]:
    """The exchange as chat messages."""
    messages = [{"role": "system", "content": item.system}] if item.system else []
    messages.append({"role": "user", "content": item.prompt})
    if with_answer:
        messages.append({"role": "assistant", "content": item.answer})
    return messages


def make_any(rng: random.Random, skill: str) -> Item:
    """An item of a skill, ``obey`` included."""
    return make_obey_item(rng) if skill == "obey" else make_item(rng, skill)


def training_rows(num_rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows in random order: single exchanges, two-turn talks, small talk and stories."""
    rng = random.Random(seed)
    skills = [*SKILLS, "obey"]
    written = 0
    while written < num_rows:
        chance = rng.random()
        if chance < 0.02:
            prompt, answer = rng.choice(TALK)
            row: dict[str, Any] = {"messages": to_messages(
                Item(prompt=prompt, answer=answer, skill="talk"), with_answer=True), "skill": "talk"}  # fmt: skip
        elif chance < 0.05:
            row = {"text": (english_story if rng.random() < 0.5 else chinese_story)(rng)}
        else:
            items = [make_any(rng, rng.choice(skills)) for _ in range(rng.choice([1, 2, 3, 4]))]
            if any(is_held_out(item.prompt) for item in items):
                continue
            messages = to_messages(items[0], with_answer=True)
            for item in items[1:]:
                if item.skill == "obey":
                    continue
                messages += [
                    m for m in to_messages(item, with_answer=True) if m["role"] != "system"
                ]
            row = {"messages": messages, "skill": items[0].skill}
        written += 1
        yield row


def held_out_rows(seed: int) -> list[dict[str, Any]]:
    """Questions of every skill whose prompts are never trained."""
    rows = []
    for skill in (*SKILLS, "obey"):
        rng = random.Random(f"{seed}-{skill}")
        seen: set[str] = set()
        while len(seen) < HELD_OUT_PER_SKILL:
            item = make_any(rng, skill)
            if is_held_out(item.prompt) and item.prompt not in seen:
                seen.add(item.prompt)
                rows.append({"messages": to_messages(item, with_answer=False),
                             "answer": item.answer, "skill": skill})  # fmt: skip
            if rng.random() < 1e-5:
                break
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Writes train.jsonl, validation.jsonl and skills.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/starter"))
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_rows(arguments.out / "train.jsonl", list(training_rows(arguments.rows, arguments.seed)))
    write_rows(arguments.out / "validation.jsonl", list(training_rows(400, arguments.seed + 1)))
    write_rows(arguments.out / "skills.jsonl", held_out_rows(arguments.seed))


if __name__ == "__main__":
    main()
