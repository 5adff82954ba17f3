"""Layers computed again: the same loss and the same gradients in every bit."""

import numpy as np
import pytest
import torch

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.fused import LoraProduct, can_fuse, sum_products
from lorakeet.adapters.settings import Lora
from lorakeet.base.records import Pack
from lorakeet.models.fast import fast_units
from lorakeet.models.packed import read_pack_facts
from lorakeet.models.recompute import OFF, OFFLOAD, ON, find_layers, recompute_layers
from lorakeet.models.shared import score_shared_pack
from tests.families import build, some_ids


def adapted(family, dropout=0.0):
    model = build(family)
    attach(model, Lora(rank=2, alpha=4, dropout=dropout))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def shared_pack():
    """Two samples of 9 and 7 tokens that open with the same four."""
    ids = some_ids(1, 12)[0].numpy()
    positions = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6])
    counts = np.array([0, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1])
    return Pack(ids_T=ids, positions_T=positions, counts_T=counts, bounds=(0, 4, 9, 12),
                parents=(-1, 0, 0), labels_N=np.array([-1, -1]))  # fmt: skip


def gradients(model, mode, score):
    model.zero_grad()
    calls = []
    first = next(find_layers(model)[0].children())
    torch.manual_seed(3)
    with fast_units(model), recompute_layers(model, mode) as num_layers:
        handle = first.register_forward_pre_hook(lambda *given: calls.append(1))
        loss = score(model)
        loss.backward()
    handle.remove()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return num_layers, len(calls), {"loss": loss.detach(), **found}


def same(one, other):
    assert one.keys() == other.keys() and len(one) > 4
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3"])
def test_a_shared_pack_has_the_same_gradients(family):
    model = adapted(family)
    assert read_pack_facts(model).is_shareable
    score = lambda model: score_shared_pack(model, shared_pack(), "cpu")  # noqa: E731
    score(model)  # asks for the facts of the head, once a model
    none, once, expected = gradients(model, OFF, score)
    assert none == 0
    for mode in (ON, OFFLOAD):
        num_layers, calls, found = gradients(model, mode, score)
        assert num_layers == 2 and calls == 2 * once
        same(found, expected)
    assert not any("forward" in layer.__dict__ for layer in model.modules())


@pytest.mark.parametrize("family", ["bert", "distilbert", "falcon"])
def test_rows_under_dropout_draw_the_same_masks_again(family):
    model = adapted(family, dropout=0.3)
    score = lambda model: model(input_ids=some_ids())[0].float().square().sum()  # noqa: E731
    expected = gradients(model, OFF, score)[2]
    for mode in (ON, OFFLOAD):
        same(gradients(model, mode, score)[2], expected)


def test_what_waits_in_main_memory_is_a_layers_input_and_nothing_more(monkeypatch):
    sent = []

    class Spy(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory):
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda x: (sent.append(tuple(x.shape)), pack(x))[1]

    monkeypatch.setattr("lorakeet.models.recompute.save_on_cpu", Spy)
    model, ids = adapted("llama"), some_ids(2, 6)
    with recompute_layers(model, OFFLOAD):
        model(input_ids=ids)[0].sum().backward()
    assert sent.count((2, 6, 32)) == 2 and not [shape for shape in sent if np.prod(shape) > 384]


def test_a_look_without_gradients_keeps_and_repeats_nothing():
    model = adapted("llama")
    with torch.no_grad(), recompute_layers(model, ON):
        assert not model(input_ids=some_ids())[0].requires_grad


@pytest.mark.parametrize("has_bias", [True, False])
def test_16_bit_products_leave_float32_gradients_of_the_factors(has_bias):
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(1))  # noqa: E731
    x, W0 = draw(3, 70, 24).bfloat16().requires_grad_(), draw(16, 24).bfloat16()
    b = draw(16).bfloat16() if has_bias else None
    A, B = (draw(*shape).requires_grad_() for shape in ((4, 24), (16, 4)))
    dy = draw(3, 70, 16).bfloat16()
    y = LoraProduct.apply(x, W0, b, A, B, 0.5)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, A, B)]
    X, A64, B64 = wide
    y64 = X @ W0.double().T + (0 if b is None else b.double()) + 0.5 * (X @ A64.T @ B64.T)
    expected = [y64, *torch.autograd.grad(y64, wide, dy.double())]
    assert [t.dtype for t in (y, dx, dA, dB)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for found, right in zip((y, dx, dA, dB), expected, strict=True):
        assert (found.double() - right).abs().max() <= 2e-2 * right.abs().max()
    assert not can_fuse(x.detach(), W0, b, A), "a CPU computes such layers in float32"


def test_sums_over_tokens_are_not_rounded_to_16_bits():
    ones = torch.ones(1, 257, dtype=torch.bfloat16)  # bfloat16 has no 257
    assert float(sum_products(ones, ones.T, torch.float32)) == 257
