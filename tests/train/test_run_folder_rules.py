"""A run folder has one writer, and a run killed before its first step goes on all the same."""

import json

import pytest

from lorakeet.api.training import resume, train
from lorakeet.base.errors import RequestError
from lorakeet.base.run_folder import RunFolder
from lorakeet.base.run_lock import hold_run


@pytest.fixture
def recipe(tmp_path):
    rows = [{"question": f"How many sails has boat {n}?", "answer": f"{n % 7}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": "starter",
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 128, "validation": 0},
        "method": {"rank": 2}, "train": {"max_steps": 2, "batch_size": 4},
    }  # fmt: skip


def test_a_folder_that_is_being_written_is_refused_and_left_alone(recipe, tmp_path):
    with hold_run(tmp_path / "run"):
        for start in (train, lambda _, run: resume(run)):
            (tmp_path / "run" / "resolved.yaml").write_text("recipe: {base: b, data: {train: x}}")
            with pytest.raises(RequestError, match="is writing this run"):
                start(recipe, tmp_path / "run")
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "resolved.yaml"]


class PowerCutError(Exception):
    pass


def test_a_run_killed_before_it_was_resolved_can_be_resumed(recipe, tmp_path):
    def cut(kind, /, **_):
        if kind == "stage_started":
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(recipe, tmp_path / "cut", emit=cut)
    assert not RunFolder(tmp_path / "cut").resolved.exists()
    with pytest.raises(RequestError, match="already holds a run"):
        train(recipe, tmp_path / "cut")
    resumed = resume(tmp_path / "cut")
    straight = train(recipe, tmp_path / "straight")
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes()
