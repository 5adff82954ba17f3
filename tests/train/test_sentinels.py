"""A fault is caught in the step in which it happens: no step is made, nothing of it is on disk."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorakeet.base.errors import BadBatchError, NumericsError
from lorakeet.base.records import EncodedSample, Origin
from lorakeet.data.shards import ShardReader, write_shards
from lorakeet.monitor.alarms import AlarmWatch
from lorakeet.monitor.sinks import fan_out
from lorakeet.train.checkpoint import Checkpoint, read_newest_checkpoint, write_checkpoint
from lorakeet.train.fit import train_model
from lorakeet.train.step import StepRunner
from tests.train.runs import Listener, digest_of, make_job, make_recipe, make_rows, measured

WHERE = ("loss", "gradient", "weight")


class Fault:
    """Spoils one number at chosen steps, and remembers the weights before each step.

    ``loss`` spoils what the model answers, ``gradient`` what flows back to one
    parameter, ``weight`` one number of a trained parameter.
    """

    def __init__(self, job, where, steps, monkeypatch, value=math.nan, pick=0):
        self.where, self.steps, self.value = where, set(steps), value
        self.step, self.digests, self.model = 0, {}, job.model
        trained = [p for p in job.model.parameters() if p.requires_grad]
        self.target = trained[pick % len(trained)]
        job.model.get_input_embeddings().register_forward_hook(self._answer)
        self.target.register_hook(self._flow)
        honest = StepRunner.run

        def run(runner, samples, seed, groups=None):
            self.step = seed[1]
            self.digests[self.step] = digest_of(self.model)
            if self.is_on("weight"):
                with torch.no_grad():
                    self.target.view(-1)[0] = self.value
            return honest(runner, samples, seed, groups)

        monkeypatch.setattr(StepRunner, "run", run)

    def is_on(self, where):
        return self.where == where and self.step in self.steps and self.model.training

    def _answer(self, _module, _inputs, output):
        return output * self.value if self.is_on("loss") else None

    def _flow(self, gradient):
        return gradient * self.value if self.is_on("gradient") else gradient


def run_job(job, heard, *, watch=False):
    emit = fan_out(heard, AlarmWatch(heard)) if watch else heard
    return train_model(job, emit=emit, validate=measured(job))


def all_on_disk_is_finite(folder):
    files = list(folder.rglob("*.safetensors"))
    return files and all(torch.isfinite(t).all() for f in files for t in load_file(f).values())


@pytest.mark.parametrize("trial", range(50))
def test_what_is_not_finite_is_caught_in_its_step_and_never_written(
    trial, tmp_path, monkeypatch, tally
):
    add = tally("NaN or infinity in loss, gradient or weight caught in its step", 1)
    draw = random.Random(trial)
    where, at = WHERE[trial % 3], draw.randint(1, 9)
    job = make_job(tmp_path, make_recipe(draw.choice(["lora", "full"]), checkpoint_every_steps=2))
    fault = Fault(job, where, [at], monkeypatch, draw.choice([math.nan, math.inf, -math.inf]),
                  pick=draw.randrange(100))  # fmt: skip
    heard = Listener()
    with pytest.raises(BadBatchError, match=rf"step {at}: ") as caught:
        run_job(job, heard)
    assert caught.value.is_in_weights == (where == "weight")
    (alarm,) = heard.all("alarm")
    assert alarm["code"] == "bad-batch" and alarm["step"] == at and not alarm["is_skipped"]
    assert alarm["rows"] and all("rows.jsonl line" in row for row in alarm["rows"])
    assert [e["step"] for e in heard.all("step")] == list(range(1, at))
    if where != "weight":
        assert digest_of(job.model) == fault.digests[at]
    saved = read_newest_checkpoint(job.run.checkpoints, Listener())
    last_good = (at - 1) // 2 * 2 if where == "weight" else at - 1
    assert (saved.step if saved else 0) == last_good
    assert all_on_disk_is_finite(tmp_path) if last_good else not list(tmp_path.rglob("step-*"))
    add()


def test_single_bad_batches_are_skipped_and_the_run_goes_on(tmp_path, monkeypatch):
    job = make_job(tmp_path, make_recipe("lora", skip_bad_batches=1))
    fault = Fault(job, "loss", [2, 5], monkeypatch)
    heard = Listener()
    result = run_job(job, heard)
    assert result.steps == 9
    assert [e["step"] for e in heard.all("step")] == [1, 3, 4, 6, 7, 8, 9]
    assert [(a["step"], a["is_skipped"]) for a in heard.all("alarm")] == [(2, True), (5, True)]
    assert fault.digests[3] == fault.digests[2] and fault.digests[6] == fault.digests[5]
    assert all_on_disk_is_finite(tmp_path)


def test_more_in_a_row_stop_the_run_at_the_last_good_state(tmp_path, monkeypatch):
    job = make_job(tmp_path, make_recipe("full", skip_bad_batches=2, checkpoint_every_steps=50))
    fault = Fault(job, "gradient", [5, 6, 7], monkeypatch)
    heard = Listener()
    with pytest.raises(BadBatchError, match="step 7"):
        run_job(job, heard)
    assert [a["is_skipped"] for a in heard.all("alarm")] == [True, True, False]
    assert read_newest_checkpoint(job.run.checkpoints, Listener()).step == 4
    assert digest_of(job.model) == fault.digests[5]


def test_a_resume_counts_bad_batches_on_from_before_the_stop(tmp_path, monkeypatch):
    recipe = make_recipe("full", skip_bad_batches=1, checkpoint_every_steps=50)
    job = make_job(tmp_path, recipe)
    Fault(job, "loss", [4, 5], monkeypatch)
    heard = Listener()
    train_model(job, emit=heard, validate=measured(job),
                stop_requested=lambda: bool(heard.all("alarm")))  # fmt: skip
    again = make_job(tmp_path, recipe, resume=True)
    Fault(again, "loss", [4, 5], monkeypatch)
    with pytest.raises(BadBatchError, match="step 5"):
        run_job(again, Listener())


@pytest.mark.parametrize("kind", ["trained", "moments", "best"])
def test_a_checkpoint_with_nan_is_never_written(kind, tmp_path):
    good = {"w": torch.ones(2)}
    tensors = {"trained": good, "moments": good, "best": good}
    tensors[kind] = {"w": torch.tensor([1.0, math.inf])}
    with pytest.raises(NumericsError, match=f"{kind}, w"):
        write_checkpoint(tmp_path, Checkpoint(step=1, progress={}, **tensors))
    assert not list(tmp_path.iterdir())


def silence(row):
    return replace(row, mask=np.zeros_like(row.mask))


def with_silent_rows(job, folder, lines):
    rows = [silence(r) if r.origin.line in lines else r for r in make_rows(24)]
    write_shards(((row, 0) for row in rows), folder / "train")
    return replace(job, data=replace(job.data, train=ShardReader(folder / "train")))


def test_rows_without_a_trained_token_are_named_and_passed_over(tmp_path):
    job = make_job(tmp_path, make_recipe("lora", epochs=1))
    heard = Listener()
    result = run_job(with_silent_rows(job, tmp_path / "silent", {3, 7}), heard)
    assert result.steps == 3 and len(heard.all("step")) == 3
    told = [row for alarm in heard.all("alarm") for row in alarm["rows"]]
    assert {alarm["code"] for alarm in heard.all("alarm")} == {"no-target"}
    assert sorted(told) == ["rows.jsonl line 3", "rows.jsonl line 7"]


def test_a_batch_of_nothing_but_silent_rows_is_a_bad_batch(tmp_path):
    job = make_job(tmp_path, make_recipe("lora", epochs=1))
    job = with_silent_rows(job, tmp_path / "silent", set(range(1, 25)))
    with pytest.raises(BadBatchError, match="no trained token"):
        run_job(job, Listener())


def codes(heard):
    return [alarm["code"] for alarm in heard.all("alarm")]


def test_a_healthy_run_tells_that_it_starts_at_the_base_and_moves_every_factor(tmp_path):
    job = make_job(tmp_path, make_recipe("lora"))
    heard = Listener()
    run_job(job, heard)
    (first,) = heard.all("first_batch")
    assert first["loss"] == first["base_loss"] > 0
    assert first["uniform_loss"] == pytest.approx(math.log(64))
    assert [e["num_zero"] for e in heard.all("factors")] == [0] * len(heard.all("factors"))
    assert heard.all("factors")[0]["num_factors"] > 0


def test_an_adapter_that_is_not_empty_at_the_start_is_told(tmp_path):
    job = make_job(tmp_path, make_recipe("lora"))
    with torch.no_grad():
        job.model.get_input_embeddings().weight.mul_(20)  # a base with an opinion
        for name, parameter in job.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    heard = Listener()
    run_job(job, heard, watch=True)
    assert "unlike-base" in codes(heard)


def test_an_untrained_base_is_told(tmp_path):
    heard = Listener()
    run_job(make_job(tmp_path, make_recipe("lora")), heard, watch=True)
    assert codes(heard)[0] == "no-knowledge"


def test_a_b_that_never_leaves_zero_is_told_by_name(tmp_path):
    job = make_job(tmp_path, make_recipe("lora"))
    name, dead = next((n, p) for n, p in job.model.named_parameters() if "lora_B" in n)
    dead.register_hook(torch.zeros_like)
    heard = Listener()
    run_job(job, heard, watch=True)
    (alarm,) = [a for a in heard.all("alarm") if a["code"] == "zero-factor"]
    assert name in alarm["message"] and "1 of" in alarm["message"]


def test_a_gradient_of_zero_is_told(tmp_path):
    job = make_job(tmp_path, make_recipe("lora"))
    for parameter in job.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    heard = Listener()
    run_job(job, heard, watch=True)
    assert codes(heard).count("stuck") == 1


def test_rows_of_a_class_are_targets_without_any_mask():
    from lorakeet.train.sentinels import split_targets

    origin = Origin(path="a", line=1)
    ids = np.arange(4, dtype=np.int32)
    row = EncodedSample(ids=ids, mask=np.zeros(4, dtype=bool), origin=origin, label=0)
    assert split_targets([row]) == ([row], [])
    bare = replace(row, label=-1)
    assert split_targets([row, bare]) == ([row], [bare])
