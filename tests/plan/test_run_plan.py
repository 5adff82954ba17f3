"""The plan of a run: told from the prepared data, and refused when it cannot fit."""

import json

import pytest

from lorakeet.api.data_facts import count_run_tokens
from lorakeet.api.planning import make_run_plan
from lorakeet.base.errors import MachineError
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.run_folder import RunFolder, read_json
from lorakeet.data.prepare import prepare_data
from lorakeet.models.load import read_tokenizer, resolve_base
from lorakeet.plan.model_facts import read_model_facts
from tests.plan.configs import write_config


@pytest.fixture
def prepare(tmp_path):
    """A run folder with prepared data of a few labelled rows, and its recipe."""
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"letter number {n}", "label": "abc"[n % 3]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**recipe):
        made = recipe_from_dict({
            "base": "starter", "task": "classify", "data": {"train": str(path), "validation": 0},
            "train": {"early_stopping": None}, **recipe,
        })  # fmt: skip
        folder = RunFolder(tmp_path / "run")
        data = prepare_data(made, read_tokenizer("starter"), folder.data, lambda *a, **k: None)
        return made, folder, data

    return run


def test_plan_json_has_the_time_of_the_run_and_the_classes_of_the_data(prepare):
    recipe, folder, data = prepare()
    told = []
    make_run_plan(recipe, resolve_base("starter"), folder, lambda *a, **k: told.append((a, k)),
                  data)  # fmt: skip
    content = read_json(folder.plan)
    lora = next(row for row in content["methods"] if row["kind"] == "lora")
    why = "the run has made steps already"
    trial = {"is_made": False, "why": why}
    assert told == [(("plan",), {"chosen": "lora", "saved_fraction": 0.0, "trial": trial})]
    if lora["tokens_per_s"]:
        assert lora["run_s"] * lora["tokens_per_s"] == pytest.approx(3 * data.train.lengths.sum())
    three = read_model_facts(resolve_base("starter"), num_labels=3)
    assert content["model"]["parameters"] == three.parameters


def test_a_run_that_cannot_fit_is_refused_with_what_would(prepare, tmp_path):
    recipe, folder, data = prepare()
    write_config(tmp_path, {"model_type": "llama", "hidden_size": 65536, "num_hidden_layers": 999})
    with pytest.raises(MachineError, match="nf4 fits a base of about"):
        make_run_plan(recipe, tmp_path, folder, lambda *a, **k: None, data)
    assert read_json(folder.plan)["chosen"] is None


@pytest.mark.parametrize(("train", "expected"), [
    ({"epochs": 1}, 600), ({"epochs": 2.5}, 1500), ({"max_steps": 2, "batch_size": 5}, 100),
    ({"max_steps": 10_000}, 1800),
])  # fmt: skip
def test_run_tokens_are_those_of_all_epochs_or_of_the_last_step(train, expected):
    recipe = recipe_from_dict({"base": "b", "data": {"train": "a.jsonl"}, "train": train})
    assert count_run_tokens(recipe, [5, 15] * 30) == expected


def test_the_plan_tells_what_samples_share_and_counts_it_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    system = {"role": "system", "content": "You answer briefly and kindly, in one sentence. " * 4}
    rows = [
        [system, {"role": "user", "content": f"Number {n}?"},
         {"role": "assistant", "content": f"It is {n}."}]
        for n in range(32)
    ]  # fmt: skip
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    folder, told, shares = RunFolder(tmp_path / "run"), [], []
    for asked in (True, False):
        recipe = recipe_from_dict({
            "base": "starter", "data": {"train": str(path), "validation": 0},
            "train": {"early_stopping": None, "share_prefixes": asked},
        })  # fmt: skip
        data = prepare_data(recipe, read_tokenizer("starter"), folder.data, lambda *a, **k: None)
        make_run_plan(recipe, resolve_base("starter"), folder, lambda *a, **k: told.append(k), data)
        shares.append(read_json(folder.plan)["shared_prefixes"])
    assert shares[1] == {"saved_fraction": 0.0, "speed_up": 1.0}
    saved = shares[0]["saved_fraction"]
    assert 0.5 < saved < 1 and shares[0]["speed_up"] == pytest.approx(1 / (1 - saved))
    assert [event["saved_fraction"] for event in told] == [saved, 0.0]


@pytest.mark.parametrize(("layers", "is_on"), [((2, 3), True), (None, False)])
def test_plan_json_says_what_keeping_the_frozen_layers_answers_costs(prepare, layers, is_on):
    recipe, folder, data = prepare(method={"layers": layers})
    make_run_plan(recipe, resolve_base("starter"), folder, lambda *a, **k: None, data)
    found = read_json(folder.plan)["frozen_cache"]
    facts = read_model_facts(resolve_base("starter"))
    assert found["is_on"] is is_on and found["reason"].startswith("On" if is_on else "Off")
    if is_on:
        assert found["num_bytes"] % (data.train.lengths.sum() * facts.hidden) == 0
        assert found["speed_up"] > 1.05
