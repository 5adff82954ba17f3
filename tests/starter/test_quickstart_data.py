"""The quickstart's documents, questions and held-out questions come from one table and agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starter.build_quickstart import general_rows, held_out_rows, question_rows
from starter.facts import FERRIES, asked_facts

import lorakeet
from lorakeet.base.recipe_file import read_recipe, recipe_from_dict
from lorakeet.data.prepare import prepare_data
from lorakeet.data.sources import read_rows
from lorakeet.models.load import read_tokenizer

EMBEDDED = Path(lorakeet.__file__).parent / "embedded"
QUICKSTART = EMBEDDED / "quickstart"
QUESTIONS = next(QUICKSTART.rglob("questions.jsonl"))


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


def test_each_held_out_fact_is_trained_in_at_least_three_other_phrasings():
    asked = list(asked_facts())
    for ferry in FERRIES:
        for name in (ferry.name, ferry.chinese_name):
            about = [a for a in asked if name in a.question]
            for attribute in {a.attribute for a in about}:
                same = [a for a in about if a.attribute == attribute]
                assert len({a.answer for a in same}) == 1, same
                assert sum(a.is_held_out for a in same) == 1, same
                assert len({a.question for a in same if not a.is_held_out}) >= 3, same


def test_no_two_boats_share_a_name_or_an_answer():
    for attribute in ("name", "captain", "home", "cargo", "code", "chinese_name",
                      "chinese_captain", "chinese_home", "chinese_cargo"):  # fmt: skip
        values = [getattr(ferry, attribute) for ferry in FERRIES]
        assert len(set(values)) == len(values), attribute


def test_the_english_documents_hold_the_english_facts(document_texts):
    for ferry in FERRIES:
        for value in (ferry.name, ferry.captain, ferry.home, ferry.cargo, ferry.code):
            assert value in document_texts["handbook.pdf"], value
            assert value in document_texts["harbours.html"], value


def test_the_chinese_notice_holds_the_chinese_facts(document_texts):
    for ferry in FERRIES:
        for value in (ferry.chinese_name, ferry.chinese_captain, ferry.chinese_home,
                      ferry.chinese_cargo, ferry.code):  # fmt: skip
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
