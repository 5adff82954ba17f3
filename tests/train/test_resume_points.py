"""A run of 60 steps and 3 epochs, stopped after any of its steps, ends with the same bytes.

``pytest -m slow`` tries every step of 24 kinds of run (4 methods x accumulation 1, 2, 4 x
packed or padded), and chains of three resumes; the usual tests take a sample.
"""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.run_folder import RunFolder, sha256_file
from lorakeet.data.prepare import PreparedData
from lorakeet.data.shards import ShardReader
from lorakeet.models.methods import METHODS, apply_method
from lorakeet.train import checkpoint_writer
from lorakeet.train.checkpoint import write_checkpoint
from lorakeet.train.loop import TrainJob
from lorakeet.train.step import StepRunner
from tests.train.runs import make_data, make_model, run_job

torch.set_num_threads(1)
STEPS, EPOCHS, BATCH = 60, 3, 4
MICRO_BATCH_TOKENS = {1: 1000, 2: 40, 4: 1}
KINDS = ("lora", "lora+", "adalora", "full")
ALL = [(kind, parts, packs) for kind in KINDS for parts in (1, 2, 4) for packs in (True, False)]
SAMPLE = [("lora", 2, True), ("lora+", 4, False), ("adalora", 1, True), ("full", 2, False)]
SAMPLED_STEPS = (1, 20, 59)  # the first, the last of an epoch, the last but one


def recipe_of(kind, parts, packs):
    method = dict(METHODS[kind].options)
    if kind != "full":
        method |= {"rank": 4, "alpha": 8, "dropout": 0.1}
    if kind == "adalora":
        method["adalora"] = {"target_rank": 2, "every_steps": 5}
    return recipe_from_dict({
        "base": "x", "data": {"train": "rows.jsonl"}, "method": method,
        "train": {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 3e-3,
                  "micro_batch_tokens": MICRO_BATCH_TOKENS[parts], "packing": packs,
                  "checkpoint_every_steps": 1, "evaluate_every_steps": 7,
                  "early_stopping": {"metric": "loss", "patience": 99}},
    })  # fmt: skip


class Bench:
    """One kind of run: its straight end, its rows by step, and a state after every step."""

    def __init__(self, folder, choice, monkeypatch):
        self.folder, self.recipe, self.rows = folder, recipe_of(*choice), {}
        make_data(folder / "data", count=STEPS * BATCH // EPOCHS)
        honest = StepRunner.run

        def run(runner, samples, seed, groups=None):
            self.rows[seed[1]] = [str(sample.origin) for sample in samples]
            self.num_groups = len(groups or runner.cut(samples))
            return honest(runner, samples, seed, groups)

        monkeypatch.setattr(StepRunner, "run", run)
        keep_all = partial(write_checkpoint, num_kept=STEPS)
        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", keep_all)
        self.end = self.run("straight")
        self.straight_rows = dict(self.rows)

    def run(self, name, *, after=None, of="straight", stop_at=None):
        """Trains on from the state ``after`` of another run; returns what the last state holds."""
        model = make_model(dropout=0.1)
        apply_method(model, self.recipe.method, task="chat", seed=self.recipe.train.seed)
        data = PreparedData(
            train=ShardReader(self.folder / "data" / "train"), label_names=(), report={},
            validation=ShardReader(self.folder / "data" / "validation"),
        )  # fmt: skip
        run, self.rows = RunFolder(self.folder / name), {}
        run.path.mkdir()
        job = TrainJob(model=model, recipe=self.recipe, data=data, run=run, pad_id=0)
        if after:
            only = self.folder / name / "from"
            only.mkdir()
            states = RunFolder(self.folder / of).checkpoints
            (only / f"step-{after:06d}").symlink_to(states / f"step-{after:06d}")
            quick = self.recipe.train.model_copy(update={"checkpoint_every_steps": STEPS})
            recipe = self.recipe.model_copy(update={"train": quick})
            job = replace(job, recipe=recipe, resume_from=only)
        result, heard = run_job(job, stop_at=stop_at)
        assert not heard.all("alarm")
        assert len(self.rows) == result.steps - (after or 0)
        state = run.checkpoints / f"step-{result.steps:06d}"
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        files = {path.name: sha256_file(path) for path in state.glob("*.safetensors")}
        return files, weights

    def check(self, name, *, after, of="straight"):
        """The run from a state on ends as the straight one, with the straight one's rows."""
        files, weights = self.run(name, after=after, of=of)
        assert files == self.end[0], (name, after)
        assert all(torch.equal(weights[key], value) for key, value in self.end[1].items())
        assert self.rows == {s: r for s, r in self.straight_rows.items() if s > after}

    def check_chain(self, seed):
        """Three stops and three resumes of one run."""
        first, second, third = sorted(random.Random(seed).sample(range(1, STEPS), 3))
        self.run(f"{seed}-a", after=first, stop_at=second - first)
        self.run(f"{seed}-b", after=second, of=f"{seed}-a", stop_at=third - second)
        self.check(f"{seed}-c", after=third, of=f"{seed}-b")


def check_straight(bench, parts):
    """60 steps, three epochs, every row once in each."""
    assert len(bench.straight_rows) == STEPS
    per_epoch = STEPS // EPOCHS
    for epoch in range(EPOCHS):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        seen = [row for step in steps for row in bench.straight_rows[step]]
        assert len(set(seen)) == len(seen) == per_epoch * BATCH
    assert bench.num_groups == parts or parts == 2


def check_points(bench, choice, steps, chains, tally):
    """Resumes after each of the steps, and some chains."""
    check_straight(bench, choice[1])
    add = tally("resumes that ended with the undisturbed bytes", len(steps))
    for step in steps:
        bench.check(f"from-{step}", after=step)
        add()
    add = tally("chains of three resumes that ended with the undisturbed bytes", chains)
    for seed in range(chains):
        bench.check_chain(seed)
        add()


@pytest.mark.parametrize("choice", SAMPLE, ids=str)
def test_a_sample_of_resume_points_ends_with_the_same_bytes(choice, tmp_path, monkeypatch, tally):
    check_points(Bench(tmp_path, choice, monkeypatch), choice, SAMPLED_STEPS, 1, tally)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("choice", ALL, ids=str)
def test_every_step_is_a_resume_point(choice, tmp_path, monkeypatch, tally):
    check_points(Bench(tmp_path, choice, monkeypatch), choice, range(1, STEPS), 5, tally)
