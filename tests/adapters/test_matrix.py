"""One behaviour matrix that every row of METHODS passes."""

import pytest
import torch

from lorakeet.adapters.attach import (
    adapter_parameters,
    attach,
    detach,
    no_adapter,
    set_active,
)
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.merge import merge, unmerge
from lorakeet.base.method_settings import MethodSettings
from lorakeet.models.methods import METHODS, apply_method, to_lora, write_trained
from tests.families import build, some_ids

torch.set_num_threads(1)
FAMILIES = ["llama", "gpt2", "bert"]
ROWS = [name for name, row in METHODS.items() if row.options["kind"] == "lora"]
rows = pytest.mark.parametrize("row", ROWS)
families = pytest.mark.parametrize("family", FAMILIES)


def asked(row):
    scale = {} if row == "vera" else {"alpha": 8}  # VeRA has none
    return MethodSettings(rank=4, **scale, **METHODS[row].options)


def lora(row, model):
    return to_lora(asked(row), model, task="chat")


def answer(model):
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


def move(model, name="default", seed=5):
    """Gives an adapter other weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def build_moved(family, row):
    model = build(family)
    attach(model, lora(row, model))
    move(model)
    return model


@families
@pytest.mark.parametrize("row", METHODS)
def test_step_0_answers_like_the_base_and_reports_what_is_trained(row, family):
    model = build(family)
    before = answer(model)
    report = apply_method(model, asked(row), task="chat", seed=0)
    assert torch.equal(answer(model), before)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert report.trained_parameters == sum(p.numel() for p in trained.values()) > 0
    if row != "full":
        assert trained.keys() == adapter_parameters(model).keys()


@families
@pytest.mark.parametrize("row", METHODS)
def test_only_what_is_trained_gets_a_gradient(row, family):
    model = build(family)
    apply_method(model, asked(row), task="chat", seed=0)
    if row != "full":
        move(model)
    model(input_ids=some_ids()).logits.square().mean().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


@families
@rows
def test_detaching_restores_the_very_objects_and_every_bit(row, family):
    model = build(family)
    modules = dict(model.named_modules())
    weights = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    attach(model, lora(row, model))
    move(model)
    answer(model)
    detach(model)
    assert dict(model.named_modules()) == modules
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(after[n] is p and torch.equal(p, w) for n, (p, w) in weights.items())
    assert all(p.requires_grad for p in after.values())


@families
@rows
def test_a_disabled_adapter_leaves_the_base_alone(row, family):
    model = build(family)
    before = answer(model)
    attach(model, lora(row, model))
    move(model)
    assert not torch.allclose(answer(model), before)
    with no_adapter(model):
        assert torch.equal(answer(model), before)


@families
@rows
def test_a_merged_adapter_answers_the_same_and_unmerging_restores_every_bit(row, family):
    model = build_moved(family, row)
    apart = answer(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    merge(model)
    assert torch.allclose(answer(model), apart, atol=2e-5)
    unmerge(model)
    assert torch.equal(answer(model), apart)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@families
@rows
def test_a_written_adapter_answers_the_same_on_the_original_base(row, family, tmp_path):
    model = build_moved(family, row)
    write_adapter(model, tmp_path / "a", base="some/base")
    other = build(family)
    read_adapter(other, tmp_path / "a")
    assert torch.allclose(answer(other), answer(model), atol=1e-5)
    again = build(family)
    write_adapter(other, tmp_path / "b", base="some/base")
    read_adapter(again, tmp_path / "b")
    assert torch.equal(answer(again), answer(other))


@families
@rows
def test_several_adapters_switch_without_touching_each_other(row, family):
    model = build(family)
    answers = {}
    for number, (name, kind) in enumerate((("one", row), ("two", "lora"), ("three", row))):
        attach(model, lora(kind, model), name=name, seed=number)
        move(model, name, seed=number)
        answers[name] = answer(model)
    for name in ("one", "three", "two", "one"):
        set_active(model, name)
        assert torch.equal(answer(model), answers[name])
    detach(model, "two")
    detach(model, "one")
    set_active(model, "three")
    assert torch.equal(answer(model), answers["three"])


def test_a_fully_trained_model_is_written_whole_and_reads_back(tmp_path):
    model = build("llama")
    settings = asked("full")
    apply_method(model, settings, task="chat", seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    write_trained(model, settings, tmp_path / "m", "b", {})
    back = type(model).from_pretrained(tmp_path / "m").eval()
    assert torch.equal(answer(back), answer(model))
