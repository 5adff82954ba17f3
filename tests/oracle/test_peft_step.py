"""A whole training step (packs, fast units, shared openings) against PEFT, a sample at a time.

PEFT in float64 is the truth.  The error of a tensor is ||g - truth|| / ||truth||.  Ours may be
2e-6, or as far as PEFT's own float32 is from the truth where rounding takes it further.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.file_names import to_file_name
from lorakeet.adapters.layer import Lora
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.records import EncodedSample, Origin
from lorakeet.models.fast import fast_units
from lorakeet.train.step import build_runner
from tests.families import DECODERS, ENCODERS, build

peft = pytest.importorskip("peft")

HERE = Origin(path="made", line=1)
SHAPE = Path(__file__).resolve().parents[3] / "shared/tokenizers/smollm2-135m-instruct/config.json"


class Keeper(torch.optim.SGD):
    """Keeps the gradients of a step; nothing moves."""

    def step(self, closure=None):
        self.kept = [p.grad.detach().clone() for p in self.param_groups[0]["params"]]


def make_samples(lengths, opening, vocabulary, *, is_row):
    """Rows of which all but the last open alike."""
    rng = np.random.default_rng(5)
    shared = rng.integers(3, vocabulary, opening)
    for number, length in enumerate(lengths):
        ids = rng.integers(3, vocabulary, opening + length)
        if number < len(lengths) - 1:
            ids[:opening] = shared
        mask = np.arange(len(ids)) >= opening + length // 3
        yield EncodedSample(
            ids=ids.astype(np.int32), mask=mask & (not is_row), origin=HERE,
            label=number % 3 if is_row else -1,
        )  # fmt: skip


def our_gradients(model, names, samples, *, is_row, micro_batch_tokens):
    """Loss and gradients of one step of the default recipe."""
    recipe = recipe_from_dict({
        "base": "unused", "data": {"train": "unused"},
        "task": "classify" if is_row else "chat",
        "train": {"micro_batch_tokens": micro_batch_tokens},
    })  # fmt: skip
    runner = build_runner(model, recipe, pad_id=0)
    keeper = Keeper(runner.parameters, lr=0.0)
    runner = type(runner)(**{**vars(runner), "optimizer": keeper, "max_gradient_norm": 1e9})
    with fast_units(model):
        loss = runner.run(samples, (0, 1)).loss
    kept = {id(p): g for p, g in zip(runner.parameters, keeper.kept, strict=True)}
    return loss, {key: kept[id(p)] for key, p in names.items()}, runner


def peft_gradients(model, names, samples, *, is_row):
    """The same of PEFT's model, one sample after the other, by torch's own loss."""
    model.zero_grad()
    num = len(samples) if is_row else sum(int(s.mask[1:].sum()) for s in samples)
    total = 0.0
    for sample in samples:
        logits = model(input_ids=torch.tensor(sample.ids[None].astype(np.int64))).logits
        if is_row:
            targets = torch.tensor([sample.label])
        else:
            logits = logits[0, :-1]
            targets = torch.tensor(np.where(sample.mask, sample.ids, -100)[1:].astype(np.int64))
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num
        loss.backward()
        total += float(loss.detach())
    return total, {key: p.grad.clone() for key, p in names.items()}


def pair_up(ours, theirs):
    """Parameters of both by file name, with equal random values."""
    own = {to_file_name(n, "default"): p for n, p in adapter_parameters(ours).items()}
    other = {
        to_file_name(n.removeprefix("base_model.model."), "default"): p
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert own.keys() == other.keys()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in own.items():
            value = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(value)
            other[key].copy_(value)
    return own, other


def compare(make, lengths, opening, vocabulary, *, is_row=False, micro_batch_tokens=96):
    ours = make()
    report = attach(ours, Lora(rank=8, alpha=16))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=sorted(report.targets))
    theirs = peft.get_peft_model(make(), config).eval()
    own, other = pair_up(ours, theirs)
    samples = list(make_samples(lengths, opening, vocabulary, is_row=is_row))
    loss, found, runner = our_gradients(
        ours, own, samples, is_row=is_row, micro_batch_tokens=micro_batch_tokens
    )
    their_loss, seen = peft_gradients(theirs, other, samples, is_row=is_row)
    truth_loss, truth = peft_gradients(theirs.double(), other, samples, is_row=is_row)
    assert loss == pytest.approx(truth_loss, rel=1e-6, abs=2 * abs(their_loss - truth_loss))
    errors = {
        key: tuple(float((x[key] - g).norm() / g.norm().clamp(min=1e-12)) for x in (found, seen))
        for key, g in truth.items()
        if float(g.norm()) > 1e-9
    }
    assert len(errors) > len(truth) // 2
    beyond = {k: e for k, e in errors.items() if e[0] > max(2e-6, 1.5 * e[1])}
    assert not beyond
    return runner, errors


@pytest.mark.parametrize("family", sorted({*DECODERS, *ENCODERS}))
def test_a_step_has_the_gradients_of_peft_one_sample_at_a_time(family):
    is_row = family in ENCODERS
    runner, _ = compare(lambda: build(family), (9, 4, 13, 2, 7, 20), 12, 96, is_row=is_row)
    assert runner.packs or family == "falcon"


@pytest.mark.slow
def test_the_shape_of_a_real_model_has_them_too():
    if not SHAPE.is_file():
        pytest.skip("../shared/tokenizers/smollm2-135m-instruct is not here")
    config = t.LlamaConfig(**json.loads(SHAPE.read_text(encoding="utf-8")))

    def make():
        torch.manual_seed(0)
        return t.LlamaForCausalLM(config).eval()

    runner, errors = compare(make, (60, 20, 100, 45), 30, config.vocab_size, micro_batch_tokens=512)
    assert runner.packs
    print(max(error for error, _ in errors.values()))
