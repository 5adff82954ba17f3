"""Small real runs: random models, rows on disk as shards, and a recipe."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import transformers as t

from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.records import EncodedSample, Origin, Validation
from lorakeet.base.run_folder import RunFolder
from lorakeet.data.prepare import PreparedData
from lorakeet.data.shards import ShardReader, write_shards
from lorakeet.models.methods import apply_method
from lorakeet.models.score import score_targets
from lorakeet.train.fit import train_model
from lorakeet.train.loop import TrainJob

torch.set_num_threads(1)
VOCABULARY = 64


def make_rows(count, seed=0, first_label=None):
    """Rows of 5 to 20 tokens that repeat themselves, so that there is something to learn."""
    draw = np.random.default_rng(seed)
    for line in range(1, count + 1):
        pattern = draw.integers(3, VOCABULARY, 3)
        ids = np.tile(pattern, 7)[: draw.integers(5, 21)].astype(np.int32)
        mask = np.arange(len(ids)) >= 3
        label = -1 if first_label is None else int(pattern[0] % 2)
        origin = Origin(path="rows.jsonl", line=line)
        yield EncodedSample(ids=ids, mask=mask, origin=origin, label=label)


def make_data(folder, count=24):
    for name, number, seed in (("train", count, 0), ("validation", 6, 1)):
        write_shards(((row, 0) for row in make_rows(number, seed)), folder / name)
    return PreparedData(
        train=ShardReader(folder / "train"), validation=ShardReader(folder / "validation"),
        label_names=(), report={},
    )  # fmt: skip


def make_model(dropout=0.0):
    torch.manual_seed(3)
    config = t.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=32, bos_token_id=1,
        eos_token_id=2, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return t.GPT2LMHeadModel(config).eval()


def make_recipe(kind="full", dropout=0.0, **train):
    method = {"kind": kind}
    if kind == "lora":
        method |= {"rank": 4, "alpha": 8, "dropout": dropout}
    defaults = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every_steps": 3,
                "evaluate_every_steps": 2, "early_stopping": None}  # fmt: skip
    return recipe_from_dict(
        {"base": "x", "data": {"train": "rows.jsonl"}, "method": method, "train": defaults | train}
    )


def make_job(folder, recipe, *, dropout=0.0, resume=False, model=None):
    model = model or make_model(dropout)
    apply_method(model, recipe.method, task="chat", seed=recipe.train.seed)
    run = RunFolder(folder)
    return TrainJob(
        model=model, recipe=recipe, data=make_data(folder / "data"), run=run, pad_id=0,
        resume_from=run.checkpoints if resume else None,
    )  # fmt: skip


class Listener:
    """Remembers every event."""

    def __init__(self):
        self.events = []

    def __call__(self, kind, /, **fields):
        self.events.append((kind, fields))

    def all(self, kind):
        return [fields for name, fields in self.events if name == kind]


def measured(job):
    """A validate that really measures the job's model."""

    def validate():
        total, count = 0.0, 0
        for row in range(len(job.data.validation)):
            sample = job.data.validation[row]
            ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
            mask = torch.from_numpy(sample.mask)[None]
            loss, number = score_targets(job.model, ids, torch.ones_like(mask), mask)
            total, count = total + float(loss), count + number
        return Validation(values={"loss": total / count})

    return validate


def run_job(job, *, stop_at=None, validate=None):
    """Trains; asks to stop after the step ``stop_at``."""
    heard = Listener()
    result = train_model(
        job, emit=heard, validate=validate or measured(job),
        stop_requested=lambda: len(heard.all("step")) == stop_at,
    )  # fmt: skip
    return result, heard


def digest_of(model):
    """One hash over the names and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()
