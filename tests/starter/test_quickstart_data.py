"""The quickstart's documents, questions and held-out questions come from one table and agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starter.build_quickstart import general_rows, held_out_rows, question_rows
from starter.facts import ENGLISH_QUESTIONS, RULES, asked_facts, is_held_out_thing
from starter.words import NOUNS

import lorakeet
from lorakeet.base.recipe_file import read_recipe, recipe_from_dict
from lorakeet.data.prepare import prepare_data
from lorakeet.data.sources import read_rows
from lorakeet.models.load import read_tokenizer

EMBEDDED = Path(lorakeet.__file__).parent / "embedded"
QUICKSTART = EMBEDDED / "quickstart"
QUESTIONS = QUICKSTART / "questions.jsonl"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_questions(rows: list[dict[str, Any]]) -> set[str]:
    return {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"}


@pytest.fixture(scope="module")
def document_texts() -> dict[str, str]:
    dropped: list[object] = []
    texts = {
        name: " ".join(
            " ".join(str(v) for v in row.fields.values())
            for row in read_rows(str(QUICKSTART / "documents" / name), dropped.append)
        )
        for name in ("handbook.pdf", "harbours.html", "notice.md")
    }
    assert not dropped
    return {name: " ".join(text.split()) for name, text in texts.items()}


def test_the_shipped_rows_are_what_the_script_writes():
    assert read_json_lines(QUESTIONS) == question_rows()
    assert read_json_lines(QUICKSTART / "heldout.jsonl") == held_out_rows()
    assert read_json_lines(QUICKSTART / "general.jsonl") == general_rows()


def test_held_out_questions_are_not_trained_in_any_file():
    trained = {row["instruction"] for row in read_json_lines(QUESTIONS)}
    assert trained.isdisjoint(last_questions(read_json_lines(QUICKSTART / "heldout.jsonl")))
    general = last_questions(read_json_lines(QUICKSTART / "general.jsonl"))
    assert general.isdisjoint(last_questions(read_json_lines(EMBEDDED / "skills.jsonl")))


def test_a_held_out_thing_is_in_no_training_question_and_every_kind_has_some_of_both():
    asked = list(asked_facts())
    trained = " ".join(a.question.lower() for a in asked if not a.is_held_out)
    kinds = {True: set(), False: set()}
    for english, (chinese, kind, _) in NOUNS.items():
        kinds[is_held_out_thing(english)].add(kind)
        if is_held_out_thing(english):
            about = [a for a in asked if a.is_held_out and f" {english}" in f" {a.question}"]
            assert len(about) >= len(ENGLISH_QUESTIONS), english
            assert not re.search(rf"\b{english}\b", trained), english
            assert f"{chinese}由" not in trained and f"签收{chinese}？" not in trained
    assert kinds[True] == kinds[False] == set(RULES)


def test_the_answers_of_an_attribute_follow_the_rule_of_the_kind():
    for asked in asked_facts():
        keys = (asked.attribute, f"chinese_{asked.attribute}")
        assert asked.answer in {getattr(r, k, None) for r in RULES.values() for k in keys}, asked


def test_no_two_kinds_share_a_value():
    for attribute in (
        "pier",
        "day",
        "clerk",
        "flag",
        "chinese_day",
        "chinese_clerk",
        "chinese_flag",
    ):
        values = [getattr(rule, attribute) for rule in RULES.values()]
        assert len(set(values)) == len(values), attribute


def test_the_english_documents_hold_the_english_rules(document_texts):
    for rule in RULES.values():
        for value in (rule.kind, rule.pier, rule.day, rule.clerk, rule.flag):
            assert value in document_texts["handbook.pdf"], value
            assert value in document_texts["harbours.html"], value


def test_the_chinese_notice_holds_the_chinese_rules(document_texts):
    for rule in RULES.values():
        for value in (rule.chinese_kind, rule.pier, rule.chinese_day, rule.chinese_clerk,
                      rule.chinese_flag):  # fmt: skip
            assert value in document_texts["notice.md"], value


def test_the_cleaner_finds_every_blemish_and_nothing_else(tmp_path):
    recipe = recipe_from_dict(
        {"base": "starter", "data": {"train": [str(QUESTIONS)], "max_tokens": 512}}
    )
    tokenizer = read_tokenizer("starter")
    report = prepare_data(recipe, tokenizer, tmp_path, lambda *_, **__: None).report
    dropped = {code: found["rows"] for code, found in report["dropped"].items()}
    assert dropped == {"duplicate": 1, "empty-answer": 1}
    assert report["private_data_masked"] == {"email": 1, "phone": 1}


def test_every_file_that_the_recipe_names_is_there():
    recipe = read_recipe(QUICKSTART / "recipe.yaml")
    named = [source.path for source in recipe.data.train] + [recipe.evaluate.questions]
    assert all((QUICKSTART / path).exists() for path in named), named
