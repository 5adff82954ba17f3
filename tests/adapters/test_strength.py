"""The strength knob: none is the base, one is the adapter, between lies on the line."""

import pytest
import torch

from lorakeet.adapters.attach import adapter_parameters, attach, set_active
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.merge import merge, unmerge
from lorakeet.adapters.strength import set_strength, strength_of
from lorakeet.base.errors import RequestError
from tests.families import build, some_ids

torch.set_num_threads(1)


def answer(model):
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


def move(model, name, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_strength_is_the_base_and_full_strength_the_adapter(family):
    model = build(family)
    base = answer(model)
    attach(model, Lora(rank=3, alpha_pattern={r".*\.0\..*": 5.0}))
    move(model, "default")
    trained = answer(model)
    assert strength_of(model) == 1
    set_strength(model, 0.0)
    assert torch.equal(answer(model), base) and strength_of(model) == 0
    set_strength(model, 0.5)
    assert not torch.allclose(answer(model), base) and not torch.allclose(answer(model), trained)
    merge(model)
    apart = answer(model)
    unmerge(model)
    assert torch.allclose(apart, answer(model), atol=2e-5)
    set_strength(model, 1.0)
    assert torch.equal(answer(model), trained)


def test_a_layer_moves_on_the_line_between_base_and_adapter():
    model = build("llama")
    attach(model, Lora(rank=3, targets=("lm_head",)))
    move(model, "default")
    answers = []
    for factor in (0.0, 1.0, -0.75):
        set_strength(model, factor)
        answers.append(answer(model))
    assert torch.allclose(answers[2], answers[0] - 0.75 * (answers[1] - answers[0]), atol=1e-5)


def test_each_adapter_has_its_own_strength():
    model = build("llama")
    for number, name in enumerate(("one", "two")):
        attach(model, Lora(rank=2), name=name)
        move(model, name, seed=number)
    two = answer(model)
    set_strength(model, 0.1, name="one")
    assert torch.equal(answer(model), two)
    assert (strength_of(model, name="one"), strength_of(model, name="two")) == (
        pytest.approx(0.1), 1,
    )  # fmt: skip
    set_active(model, "one")
    assert not torch.equal(answer(model), two)


def test_what_cannot_be_scaled_is_refused():
    model = build("bert")
    attach(model, Lora(rank=2, targets=("query",), modules_to_save=("classifier",)))
    with pytest.raises(RequestError, match="modules_to_save"):
        set_strength(model, 0.5)
    model = build("llama")
    with pytest.raises(RequestError, match="no adapter"):
        set_strength(model, 0.5)
    attach(model, Lora(rank=2))
    with pytest.raises(RequestError, match="finite"):
        set_strength(model, float("inf"))
    merge(model)
    with pytest.raises(RequestError, match="Unmerge it first"):
        set_strength(model, 0.5)
