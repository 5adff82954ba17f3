"""The starter's corpus keeps its held-out prompts out of training; the shipped files agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starter.build_corpus import HELD_OUT_PER_SKILL, held_out_rows, is_held_out, training_rows
from starter.skills import SKILLS

import lorakeet
from lorakeet.models.load import read_tokenizer

EMBEDDED = Path(lorakeet.__file__).parent / "embedded"
SAMPLE_ROWS = 3_000


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_of(rows: list[dict[str, Any]]) -> list[str]:
    return [m["content"] for row in rows for m in row.get("messages", []) if m["role"] == "user"]


@pytest.fixture(scope="module")
def training_sample() -> list[dict[str, Any]]:
    return list(training_rows(SAMPLE_ROWS, seed=0))


@pytest.fixture(scope="module")
def skills_file() -> list[dict[str, Any]]:
    return read_json_lines(EMBEDDED / "skills.jsonl")


def test_one_seed_gives_one_corpus_and_another_seed_another(training_sample):
    assert list(training_rows(SAMPLE_ROWS, seed=0)) == training_sample
    assert list(training_rows(100, seed=1)) != training_sample[:100]


def test_no_turn_of_the_training_rows_asks_a_held_out_prompt(training_sample, skills_file):
    skilled = [row for row in training_sample if row.get("skill") != "talk"]
    assert not any(is_held_out(prompt) for prompt in prompts_of(skilled))
    held_out = prompts_of(skills_file)
    assert all(is_held_out(prompt) for prompt in held_out)
    assert set(prompts_of(training_sample)).isdisjoint(held_out)


def test_the_shipped_skills_are_what_the_script_writes(skills_file):
    assert held_out_rows(seed=0) == skills_file


def test_every_skill_has_the_same_number_of_different_held_out_prompts(skills_file):
    for skill in (*SKILLS, "obey"):
        prompts = [row["messages"][-1]["content"] for row in skills_file if row["skill"] == skill]
        assert len(prompts) == len(set(prompts)) == HELD_OUT_PER_SKILL, skill


@pytest.mark.parametrize("skill", ["larger", "pick", "repeat", "look_up"])
def test_the_answer_stands_in_the_prompt_where_the_skill_is_to_find_it(skills_file, skill):
    for row in skills_file:
        if row["skill"] == skill:
            assert row["answer"] in row["messages"][-1]["content"], row


def test_counted_words_are_as_many_as_the_answer_says(skills_file):
    for row in skills_file:
        if row["skill"] == "count":
            prompt = row["messages"][-1]["content"]
            assert int(row["answer"]) == prompt.count(", ") + prompt.count("、") + 1, row


def test_the_template_marks_every_turn_and_opens_the_answer():
    tokenizer = read_tokenizer("starter")
    turns = [
        {"role": "system", "content": "Answer in English."},
        {"role": "user", "content": "你好！"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nAnswer in English.<|im_end|>\n"
        "<|im_start|>user\n你好！<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox, 1,234.50!",
        "红隼湾的渡轮，今天几点开？",
        "naïve café — 😀\t\n  end",
        "",
    ],
)
def test_text_of_any_kind_comes_back_from_its_tokens(text):
    tokenizer = read_tokenizer("starter")
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_each_digit_is_a_token_of_its_own():
    assert read_tokenizer("starter").tokenize("2026") == ["2", "0", "2", "6"]
