"""A measured plan: real steps in a process of their own, told beside the prediction."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from lorakeet.api.measuring import choose_trial, run_trial
from lorakeet.api.planning import make_run_plan, plan
from lorakeet.base.errors import MachineError
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.run_folder import RunFolder, read_json
from lorakeet.base.units import GIB, MIB, to_readable_bytes
from lorakeet.data.prepare import prepare_data
from lorakeet.models.load import read_tokenizer, resolve_base
from lorakeet.plan.choose import make_plan
from lorakeet.plan.hardware import Hardware
from lorakeet.plan.table import render_plan


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"a short letter number {n} about the weather"} for n in range(12)]
    rows.append({"text": "a long letter about the weather " * 60})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_from_dict({
        "base": "starter", "task": "text", "data": {"train": str(path), "validation": 0},
        "train": {"early_stopping": None, "epochs": 2},
    })  # fmt: skip


@pytest.fixture
def with_free(monkeypatch):
    """Makes the planner see a machine with this much free memory."""

    def install(free_bytes):
        machine = Hardware(cores=2, memory_bytes=24 * GIB, free_memory_bytes=int(free_bytes),
                           disk_free_bytes=GIB)  # fmt: skip
        monkeypatch.setattr("lorakeet.plan.choose.read_training_hardware", lambda: machine)

    return install


@pytest.fixture
def prepared(recipe, tmp_path):
    run = RunFolder(tmp_path / "run")
    return run, prepare_data(recipe, read_tokenizer("starter"), run.data, lambda *a, **k: None)


def make(recipe, prepared, **options):
    run, data = prepared
    make_run_plan(recipe, resolve_base("starter"), run, lambda *a, **k: None, data, **options)
    return read_json(run.plan)


def predict(recipe, prepared):
    """Predicted bytes of the recipe's method."""
    return next(m for m in make(recipe, prepared)["methods"] if m["kind"] == "lora")["bytes"]


def test_a_measured_plan_tells_both_and_leaves_the_caller_as_it_was(recipe):
    state = torch.get_rng_state()
    made = plan(recipe, measure=True, price_per_hour=3.6)
    found = made.to_dict()["measured"]
    lora = next(row for row in made.to_dict()["methods"] if row["kind"] == "lora")
    assert torch.equal(torch.get_rng_state(), state)
    assert found["predicted_bytes"] == lora["bytes"]["total"]
    assert found["memory_correction"] == found["peak_bytes"] / found["predicted_bytes"]
    assert 0.8 < found["memory_correction"] < 1.25
    assert found["cost"] == pytest.approx(found["run_s"] / 1000)
    assert lora["cost"] == pytest.approx(lora["run_s"] / 1000)
    console = Console(width=80, file=io.StringIO())
    console.print(render_plan(made))
    text = console.file.getvalue()
    for word in ("predicted", "measured", "difference", "peak memory", "cost of lora"):
        assert word in text


def test_a_new_run_is_tried_first_and_the_plan_says_why_or_why_not(recipe, prepared, with_free):
    asked = predict(recipe, prepared)
    free = asked["process"] + 5 * (asked["total"] - asked["process"])
    with_free(free)
    content = make(recipe, prepared, is_new=True)
    assert 0 < content["measured"]["peak_bytes"] < free
    assert content["measured"]["num_steps"] == 1, "only the plan's own command times many"
    assert content["trial"]["is_made"] and "% of the memory that is free" in content["trial"]["why"]
    assert not list(prepared[0].data.glob("trial*"))
    off = recipe.model_copy(
        update={"plan": recipe.plan.model_copy(update={"measure_first": False})}
    )
    for asked, is_new, why in ((off, True, "plan.measure_first is false"),
                               (recipe, False, "has made steps already")):  # fmt: skip
        content = make(asked, prepared, is_new=is_new)
        assert "measured" not in content and why in content["trial"]["why"]
    with_free(20 * GIB)
    content = make(recipe, prepared, is_new=True)
    assert "measured" not in content and "ten times as much would fit" in content["trial"]["why"]


def test_what_the_planner_does_not_know_is_always_tried(recipe, prepared, with_free):
    with_free(20 * GIB)
    known = make_plan(recipe, resolve_base("starter"))
    assert not choose_trial(recipe, known, is_new=True).is_made
    other = replace(known, facts=replace(known.facts, model_type="sailor"))
    found = choose_trial(recipe, other, is_new=True)
    assert found.is_made and "sailor is not known" in found.why


def test_what_was_measured_decides_and_what_is_far_too_much_is_refused_at_once(
    recipe, prepared, with_free
):
    free = int(0.7 * predict(recipe, prepared)["total"])
    with_free(free)
    told = f"in trial steps and {to_readable_bytes(free)} is free"
    with pytest.raises(MachineError, match=told):
        make(recipe, prepared, is_new=True)
    assert read_json(prepared[0].plan)["measured"]["peak_bytes"] > free
    with_free(50 * MIB)
    with pytest.raises(MachineError, match="needs .* and 45.00 MiB is free"):
        make(recipe, prepared, is_new=True)
    assert "measured" not in read_json(prepared[0].plan)


def test_a_trial_that_fails_says_why(recipe, tmp_path):
    lost = recipe.model_copy(update={"base": str(tmp_path)})
    with pytest.raises(MachineError, match="trial steps failed.*config.json"):
        run_trial(lost, tmp_path)
    assert not list(tmp_path.glob("trial*"))
