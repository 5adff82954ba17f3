"""Train, resume, eval and merge keep the registry; one that cannot be written stops nothing."""

import json

import pytest
import torch

from lorakeet.api.evaluation import evaluate
from lorakeet.api.runs import find_run, list_runs, scan_runs
from lorakeet.api.shipping import export_merged
from lorakeet.api.training import resume, train
from lorakeet.base.errors import BadBatchError, InterruptedRun
from lorakeet.base.events import read_events
from lorakeet.base.registry import VARIABLE

torch.set_num_threads(1)


@pytest.fixture
def recipe(tmp_path):
    rows = [{"question": f"How many sails has boat {n}?", "answer": f"{n % 7}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": "starter",
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 64, "validation": 0.2},
        "method": {"rank": 2}, "train": {"max_steps": 2, "batch_size": 2},
    }  # fmt: skip


def test_a_run_is_on_record_from_its_start_through_stop_resume_evaluation_and_merge(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.delenv(VARIABLE, raising=False)
    root = tmp_path / "runs"
    seen = []

    def hear(kind, /, **_):
        if kind == "step":
            seen.append(find_run("law", root).state)

    with pytest.raises(InterruptedRun):
        train(recipe, root / "law", emit=hear, stop_requested=lambda: bool(seen))
    assert seen == ["running"] and find_run("law", root).state == "interrupted"
    resume(root / "law")
    trained = find_run("law", root)
    assert (trained.state, trained.steps) == ("finished", 2)
    assert trained.scores["validation perplexity"] > 1 and trained.hashes["base"]
    evaluate(root / "law")
    assert find_run("law", root).scores["perplexity tuned"] > 1
    export_merged(root / "law", root / "law-merged", proof="tensors")
    merged = find_run("law-merged", root)
    assert merged.kind == "model" and merged.parents[0]["folder"] == str(root / "law")
    before = list_runs(root)
    (root / "registry.sqlite").unlink()
    scan_runs(root)
    assert list_runs(root) == before


def test_a_registry_that_cannot_be_written_is_an_alarm_and_no_error(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    trained = train(recipe, tmp_path / "law")
    assert (trained.adapter / "adapter_model.safetensors").is_file()
    alarms = [e for e in read_events(tmp_path / "law" / "events.jsonl") if e["kind"] == "alarm"]
    assert "registry" in {alarm["code"] for alarm in alarms}


def test_a_run_that_failed_says_why(recipe, tmp_path, monkeypatch):
    from lorakeet.train.step import StepRunner

    def spoil(*_):
        raise BadBatchError("step 1: the loss is nan.", rows=["rows.jsonl line 1"])

    monkeypatch.setattr(StepRunner, "run", spoil)
    with pytest.raises(BadBatchError):
        train(recipe, tmp_path / "runs" / "law")
    failed = find_run("law", tmp_path / "runs")
    assert failed.state == "failed" and "the loss is nan" in failed.problem
