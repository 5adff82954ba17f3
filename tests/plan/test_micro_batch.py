"""How many tokens pass the model at once where the recipe leaves it open."""

import json
from dataclasses import replace

import pytest

from lorakeet.api.data_facts import estimate_saved_fraction, settle_micro_batch
from lorakeet.api.training import train
from lorakeet.base.recipe_file import read_recipe, recipe_from_dict
from lorakeet.base.run_folder import RunFolder
from lorakeet.data.prepare import prepare_data
from lorakeet.models.load import read_tokenizer, resolve_base
from lorakeet.plan import choose

WORD = "the "


@pytest.fixture
def prepare(tmp_path):
    """Chats under one opening of about as many tokens as asked, and their recipe."""

    def run(opening_tokens, **train_settings):
        path = tmp_path / "rows.jsonl"
        rows = [
            [{"role": "user", "content": WORD * opening_tokens + f" Question {n}?"},
             {"role": "assistant", "content": f"It is {n}. " * 8}]
            for n in range(32)
        ]  # fmt: skip
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        recipe = recipe_from_dict({
            "base": "starter",
            "data": {"train": str(path), "validation": 0, "max_tokens": 4096},
            "train": {"early_stopping": None, "max_steps": 1, **train_settings},
        })  # fmt: skip
        silent = lambda *a, **k: None  # noqa: E731
        data = prepare_data(recipe, read_tokenizer("starter"), tmp_path / "data", silent)
        return recipe, data

    return run


def settle(recipe, data):
    return settle_micro_batch(recipe, resolve_base("starter"), data)


def test_rows_with_little_in_common_keep_the_usual_packs(prepare):
    recipe, data = prepare(4)
    assert settle(recipe, data) is recipe


def test_a_long_opening_is_given_packs_in_which_it_stands_less_often(prepare):
    recipe, data = prepare(300)
    settled = settle(recipe, data)
    assert settled.train.micro_batch_tokens > 1024
    saved = [estimate_saved_fraction(each, data.train) for each in (recipe, settled)]
    assert 1 - saved[1] <= 0.9 * (1 - saved[0])
    assert recipe.train.micro_batch_tokens == "auto"  # the user's recipe is not touched


def test_a_document_longer_than_the_next_packs_finds_the_one_that_holds_its_questions(prepare):
    recipe, data = prepare(2200)
    assert min(data.train.lengths) > 2048
    settled = settle(recipe, data)
    assert settled.train.micro_batch_tokens >= 4096
    assert estimate_saved_fraction(recipe, data.train) == 0.0
    assert estimate_saved_fraction(settled, data.train) > 0.4


@pytest.mark.parametrize("asked", [
    {"micro_batch_tokens": 1024}, {"share_prefixes": False}, {"packing": False},
])  # fmt: skip
def test_what_the_recipe_says_stands(prepare, asked):
    recipe, data = prepare(300, **asked)
    assert settle(recipe, data) is recipe


def test_larger_packs_that_do_not_fit_are_not_taken(prepare, monkeypatch):
    recipe, data = prepare(300)
    read = choose.read_training_hardware
    full = lambda: replace(read(), free_memory_bytes=1, gpus=())  # noqa: E731
    monkeypatch.setattr(choose, "read_training_hardware", full)
    assert settle(recipe, data) is recipe


def test_a_run_notes_the_packs_that_it_took(prepare, tmp_path):
    recipe, data = prepare(300)
    train(recipe, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert read_recipe(run.recipe).train.micro_batch_tokens == "auto"
    limit = settle(recipe, data).train.micro_batch_tokens
    assert f"micro_batch_tokens: {limit}" in run.resolved.read_text()
