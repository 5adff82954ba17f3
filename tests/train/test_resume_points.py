"""A run of 60 steps and 3 epochs can be stopped after any of its steps, and again, and again.

Two claims, for 30 kinds of run (5 methods x accumulation 1, 2, 4 x packed or padded):

chain   the run is stopped after every step and taken up with a new model and optimiser: 59
        resumes in a row, and each state on the disk is the straight run's, byte for byte;
        with that, a resume from any step starts from the straight run's own state
to end  from three steps, and in chains of three resumes at random steps, the run goes on to
        its last step and ends with the straight run's bytes

``pytest -m slow`` tries all of it; the usual tests take a sample.
"""

import json
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
from lorakeet.quant.convert import QuantizedForm, quantize_model
from lorakeet.train import checkpoint_writer
from lorakeet.train.checkpoint import write_checkpoint
from lorakeet.train.loop import TrainJob
from lorakeet.train.step import StepRunner
from tests.train.runs import make_data, make_model, run_job

torch.set_num_threads(1)
STEPS, EPOCHS, BATCH = 60, 3, 4
MICRO_BATCH_TOKENS = {1: 1000, 2: 40, 4: 1}
KINDS = ("lora", "qlora", "lora+", "adalora", "full")
ALL = [(kind, parts, packs) for kind in KINDS for parts in (1, 2, 4) for packs in (True, False)]
SAMPLE = [("lora", 2, True), ("qlora", 1, False), ("adalora", 1, True), ("full", 4, False)]


def name_of(choice):
    kind, parts, packs = choice
    return f"{kind}-{parts}-{'packed' if packs else 'padded'}"


def recipe_of(kind, parts, packs):
    method = dict(METHODS["lora" if kind == "qlora" else kind].options)
    if kind != "full":
        method |= {"rank": 4, "alpha": 8, "dropout": 0.1}
    if kind == "adalora":
        method["adalora"] = {"target_rank": 2, "every_steps": 5}
    return recipe_from_dict({
        "base": "x", "data": {"train": "rows.jsonl"}, "method": method,
        "quantization": {"kind": "nf4" if kind == "qlora" else "none"},
        "train": {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 3e-3,
                  "micro_batch_tokens": MICRO_BATCH_TOKENS[parts], "packing": packs,
                  "checkpoint_every_steps": 1, "evaluate_every_steps": 7,
                  "early_stopping": {"metric": "loss", "patience": 99}},
    })  # fmt: skip


def model_of(recipe):
    """The tiny base as the recipe wants it, before its first step."""
    model = make_model(dropout=0.1)
    if recipe.quantization.is_on:
        layers = [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
        quantize_model(model, layers, QuantizedForm(kind=recipe.quantization.kind))
    apply_method(model, recipe.method, task="chat", seed=recipe.train.seed)
    return model


def content_of(state):
    """Hashes of a checkpoint's tensors, and its other values but for the seconds."""
    content = {path.name: sha256_file(path) for path in state.glob("*.safetensors")}
    content |= json.loads((state / "progress.json").read_text())
    return content | {"step_time_s": None}


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

    def run(self, name, *, resume_from=None, stop_at=None):
        """Trains from the start or a folder of states; returns its end."""
        model = model_of(self.recipe)
        data = PreparedData(
            train=ShardReader(self.folder / "data" / "train"), label_names=(), report={},
            validation=ShardReader(self.folder / "data" / "validation"),
        )  # fmt: skip
        run, self.rows = RunFolder(self.folder / name), {}
        run.path.mkdir(exist_ok=True)
        recipe = self.recipe
        if resume_from:  # its every state is not looked at
            rare = recipe.train.model_copy(update={"checkpoint_every_steps": STEPS})
            recipe = recipe.model_copy(update={"train": rare})
        job = TrainJob(model=model, recipe=recipe, data=data, run=run, pad_id=0)
        result, heard = run_job(replace(job, resume_from=resume_from), stop_at=stop_at)
        assert not heard.all("alarm")
        assert [*self.rows] == [*range(result.steps - len(self.rows) + 1, result.steps + 1)]
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        return content_of(run.checkpoints / f"step-{result.steps:06d}"), weights

    def check_chain(self, num_steps):
        """Stopped after every step: each state and each step's rows are the straight run's."""
        straight, seen = RunFolder(self.folder / "straight").checkpoints, {}
        states = RunFolder(self.folder / "chain").checkpoints
        for step in range(1, num_steps + 1):
            content, weights = self.run("chain", resume_from=states if seen else None, stop_at=1)
            assert content == content_of(straight / f"step-{step:06d}"), step
            seen |= self.rows
            yield step
        assert seen == {step: self.straight_rows[step] for step in range(1, num_steps + 1)}
        if num_steps == STEPS:
            self.check_end(content, weights)

    def check_to_end(self, name, *points):
        """Resumes at each of the points in turn; the last one runs to the end."""
        states = RunFolder(self.folder / f"{name}-0").checkpoints
        states.mkdir(parents=True)
        first = f"step-{points[0]:06d}"
        (states / first).symlink_to(RunFolder(self.folder / "straight").checkpoints / first)
        for number, (start, stop) in enumerate(zip(points, (*points[1:], None), strict=True), 1):
            stop_at = stop and stop - start
            end = self.run(f"{name}-{number}", resume_from=states, stop_at=stop_at)
            states = RunFolder(self.folder / f"{name}-{number}").checkpoints
        self.check_end(*end)
        assert self.rows == {s: r for s, r in self.straight_rows.items() if s > points[-1]}

    def check_end(self, content, weights):
        assert content == self.end[0]
        assert all(torch.equal(weights[key], value) for key, value in self.end[1].items())


def check_straight(bench, parts):
    """60 steps, three epochs, every row once in each."""
    assert len(bench.straight_rows) == STEPS
    per_epoch = STEPS // EPOCHS
    for epoch in range(EPOCHS):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        seen = [row for step in steps for row in bench.straight_rows[step]]
        assert len(set(seen)) == len(seen) == per_epoch * BATCH
    assert bench.num_groups == parts or parts == 2


def check_points(bench, choice, num_steps, points, num_threes, tally):
    """The chain through the first steps, resumes to the end, and three in a row to the end."""
    kind = choice[0]
    check_straight(bench, choice[1])
    add = tally(f"{kind}: stops after a step, each resumed with the undisturbed bytes", num_steps)
    for _ in bench.check_chain(num_steps):
        add()
    count = len(points) + num_threes
    add = tally(f"{kind}: runs resumed once or three times that ended undisturbed", count)
    for step in points:
        bench.check_to_end(f"from-{step}", step)
        add()
    for seed in range(num_threes):
        draw = random.Random(seed)
        bench.check_to_end(f"three-{seed}", *sorted(draw.sample(range(1, STEPS), 3)))
        add()


@pytest.mark.parametrize("choice", SAMPLE, ids=name_of)
def test_a_sample_of_resume_points_ends_with_the_same_bytes(choice, tmp_path, monkeypatch, tally):
    bench = Bench(tmp_path, choice, monkeypatch)
    check_points(bench, choice, 8, (20,), 1, tally)  # 20 is the last step of an epoch


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("choice", ALL, ids=name_of)
def test_every_step_is_a_resume_point(choice, tmp_path, monkeypatch, tally):
    bench = Bench(tmp_path, choice, monkeypatch)
    check_points(bench, choice, STEPS, (10, 30, 50), 2, tally)
