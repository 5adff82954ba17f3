"""Runs whose samples share openings: the same losses, and a resumed run to the bit."""

import numpy as np
import pytest

from lorakeet.base.records import EncodedSample, Origin
from lorakeet.data.prepare import PreparedData
from lorakeet.data.shards import ShardReader, write_shards
from lorakeet.train.step import build_runner
from tests.train.runs import (
    VOCABULARY,
    digest_of,
    make_job,
    make_model,
    make_recipe,
    make_rows,
    run_job,
)

SYSTEM = np.random.default_rng(9).integers(3, VOCABULARY, 18).astype(np.int32)


def with_opening(rows):
    """The rows below one system prompt; every third keeps to itself."""
    for number, row in enumerate(rows):
        if number % 3 == 2:
            yield row
            continue
        tail = row.ids[:12]
        yield EncodedSample(
            ids=np.concatenate([SYSTEM, tail]),
            mask=np.concatenate([np.zeros(len(SYSTEM), bool), np.arange(len(tail)) >= 2]),
            origin=Origin(path="rows.jsonl", line=row.origin.line),
        )


def make_sharing_job(folder, *, resume=False, dropout=0.0, **train):
    recipe = make_recipe("lora", dropout, checkpoint_every_steps=2, **train)
    job = make_job(folder, recipe, resume=resume)
    for name, number, seed in (("train", 24, 0), ("validation", 6, 1)):
        rows = ((row, 0) for row in with_opening(make_rows(number, seed)))
        write_shards(rows, folder / "shared" / name)
    data = PreparedData(
        train=ShardReader(folder / "shared" / "train"),
        validation=ShardReader(folder / "shared" / "validation"), label_names=(), report={},
    )  # fmt: skip
    return type(job)(**{**vars(job), "data": data})


def step_losses(heard):
    return [event["loss"] for event in heard.all("step")]


def test_a_run_with_sharing_has_the_losses_of_one_without(tmp_path):
    (with_it, heard), (without, plain) = (
        run_job(make_sharing_job(tmp_path / str(shares), share_prefixes=shares))
        for shares in (True, False)
    )
    assert step_losses(heard) == pytest.approx(step_losses(plain), rel=1e-5)
    assert with_it.best_values == pytest.approx(without.best_values, rel=1e-5)
    (path,), (plain_path,) = heard.all("path"), plain.all("path")
    assert 0.2 < path["saved_fraction"] < 0.6 and plain_path["saved_fraction"] == 0
    tokens = [[event["num_tokens"] for event in h.all("step")] for h in (heard, plain)]
    assert tokens[0] == tokens[1]  # all real tokens count as trained


def test_a_resumed_run_with_sharing_is_bit_identical(tmp_path):
    whole = make_sharing_job(tmp_path / "whole")
    _, heard = run_job(whole)
    broken = make_sharing_job(tmp_path / "broken")
    result, first = run_job(broken, stop_at=3)
    assert result.interrupted
    again = make_sharing_job(tmp_path / "broken", resume=True)
    _, second = run_job(again)
    assert step_losses(first) + step_losses(second) == step_losses(heard)
    assert digest_of(again.model) == digest_of(whole.model)


def test_dropout_turns_sharing_off(tmp_path):
    recipe = make_recipe("lora", dropout=0.1)
    model = make_job(tmp_path, recipe).model
    assert not build_runner(model, recipe, pad_id=0).shares
    plain = make_recipe("lora")
    assert build_runner(make_job(tmp_path, plain).model, plain, pad_id=0).shares
    leaky = make_job(tmp_path, plain, model=make_model(dropout=0.1).train())
    assert not build_runner(leaky.model, plain, pad_id=0).shares
