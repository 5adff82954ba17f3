"""The cost of rounding each layer, against autograd's gradients and against real passes."""

from __future__ import annotations

import gzip
import json
from itertools import islice

import pytest
import torch
from torch import nn

from lorakeet.adapters.targets import linear_names
from lorakeet.base.errors import NumericsError
from lorakeet.models.score import score_targets
from lorakeet.models.sensitivity import measure_sensitivity, rounded
from lorakeet.quant.convert import QuantizedForm
from lorakeet.quant.linear import QuantizedLinear, expand
from tests.families import build

FORMS = {"nf4": QuantizedForm(), "int8": QuantizedForm(kind="int8")}


def score(model, ids):
    is_real = torch.ones_like(ids, dtype=torch.bool)
    is_target = is_real.clone()
    is_target[:, 0] = False
    return score_targets(model, ids, is_real, is_target)


def samples_of(model, num=3):
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(1, 60, (1, 9 + n), generator=rng) for n in range(num)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_cost_is_half_the_squared_change_that_autograd_predicts(family):
    model = build(family).eval()
    samples, names = samples_of(model), linear_names(model)
    expected = dict.fromkeys(names, 0.0)
    targets = 0
    for ids in samples:
        loss, count = score(model, ids)
        targets += count
        weights = [model.get_submodule(name).weight for name in names]
        for name, g, W in zip(names, torch.autograd.grad(loss, weights), weights, strict=True):
            layer = next(iter(measure_forms(model, [name]).values()))
            moved = expand(layer.forms["nf4"], torch.float32) - layer.weight
            expected[name] += float((g * (moved.T if layer.is_turned else moved)).sum()) ** 2 / 2
            assert W.requires_grad
    found = measure_sensitivity(model, samples, score, dict.fromkeys(names, FORMS))
    for name in names:
        assert found[name].cost["nf4"] == pytest.approx(expected[name] / targets, rel=1e-3)
        assert 0 < found[name].cost["int8"] < found[name].cost["nf4"]


def measure_forms(model, names):
    """Layers with their forms, and no sample scored."""
    from lorakeet.models.sensitivity import Layer

    return {name: Layer(model.get_submodule(name), FORMS) for name in names}


def test_rounded_layers_stand_in_the_model_and_leave_it_as_it_was():
    model = build("llama").eval()
    names = linear_names(model)
    layers = measure_forms(model, names)
    ids = samples_of(model)[0]
    before = score(model, ids)[0]
    chosen = dict.fromkeys(names, "nf4") | {names[0]: "none"}
    with torch.no_grad(), rounded(model, layers, chosen):
        assert isinstance(model.get_submodule(names[0]), nn.Linear)
        assert isinstance(model.get_submodule(names[1]), QuantizedLinear)
        assert float(score(model, ids)[0]) != float(before)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in names)
    assert float(score(model, ids)[0]) == float(before)


def test_nan_in_a_weight_is_told_with_its_layer():
    model = build("llama")
    name = linear_names(model)[3]
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=f"^{name}: a weight of .* holds NaN"):
        measure_sensitivity(model, [], score, dict.fromkeys(linear_names(model), FORMS))


@pytest.mark.slow
def test_the_costs_rank_layers_as_real_passes_do(tiny_llama, shared):
    """Judged by the divergence KL(plain, rounded) of a real model's answers to real text."""
    from lorakeet.models.load import load_model

    model, tokenizer = load_model(str(tiny_llama))
    names = linear_names(model)
    with gzip.open(shared / "data" / "tinystories" / "valid.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in islice(file, 16)]
    samples = [torch.tensor([tokenizer(text)["input_ids"][:96]]) for text in texts]
    layers = measure_sensitivity(model, samples, score, dict.fromkeys(names, FORMS))

    def answers():
        return torch.cat([model(ids).logits[0, :-1].log_softmax(-1) for ids in samples])

    with torch.no_grad():
        plain, found = answers(), []
        for name in names:
            with rounded(model, layers, dict.fromkeys(names, "none") | {name: "nf4"}):
                found.append(float((plain.exp() * (plain - answers())).sum(-1).mean()))
    costs = [layers[name].cost["nf4"] for name in names]
    ranks = (torch.tensor(each).argsort().argsort().double() for each in (costs, found))
    assert float(torch.corrcoef(torch.stack(list(ranks)))[0, 1]) > 0.75
    assert 0.5 < sum(costs) / sum(found) < 2
