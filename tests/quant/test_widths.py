"""A budget of bytes spent on the layers whose rounding hurts most."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from lorakeet.base.errors import RequestError
from lorakeet.quant.convert import QuantizedForm, quantize_weight
from lorakeet.quant.linear import QuantizedLinear
from lorakeet.quant.widths import Option, choose_widths, count_bytes

FORMS = [
    QuantizedForm(double=False),
    QuantizedForm(),
    QuantizedForm(block_size=128),
    QuantizedForm(kind="int8"),
]


@pytest.mark.parametrize("shape", [(3, 64), (40, 128), (300, 64), (512, 320)])
@pytest.mark.parametrize("form", FORMS)
def test_counted_bytes_are_those_that_a_layer_holds(shape, form):
    if shape[0] * shape[1] % form.block_size:
        pytest.skip("no whole blocks")
    layer = QuantizedLinear(quantize_weight(torch.ones(shape), form))
    assert count_bytes(shape, form, 4) == layer.held_bytes


def draw_layers(rng, num):
    return {
        f"layer {i}": {
            "nf4": Option(num_bytes=4 * size, cost=cost),
            "int8": Option(num_bytes=8 * size, cost=cost / 250),
            "none": Option(num_bytes=32 * size, cost=0.0),
        }
        for i, size, cost in ((i, rng.randint(1, 9), rng.random()) for i in range(num))
    }


def totals(layers, chosen):
    options = [layers[name][form] for name, form in chosen.items()]
    return sum(o.num_bytes for o in options), sum(o.cost for o in options)


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_holds_and_the_choice_is_near_the_best_of_all(seed):
    rng = random.Random(seed)
    layers = draw_layers(rng, 6)
    limit = rng.uniform(4.0, 9.0) * totals(layers, dict.fromkeys(layers, "nf4"))[0] / 4
    num_bytes, cost = totals(layers, choose_widths(layers, limit))
    assert num_bytes <= limit
    every = [
        totals(layers, dict(zip(layers, forms, strict=True)))
        for forms in itertools.product(("nf4", "int8", "none"), repeat=len(layers))
    ]
    best = min(cost for num_bytes, cost in every if num_bytes <= limit)
    largest = max(own["nf4"].cost for own in layers.values())
    assert best <= cost <= best + largest  # what greed loses is at most one layer's cost


def test_without_room_all_stay_small_and_with_room_all_are_plain():
    layers = draw_layers(random.Random(1), 5)
    least = totals(layers, dict.fromkeys(layers, "nf4"))[0]
    assert set(choose_widths(layers, least).values()) == {"nf4"}
    assert set(choose_widths(layers, 8 * least).values()) == {"none"}
    with pytest.raises(RequestError, match="Raise quantization.bits_per_weight"):
        choose_widths(layers, least - 1)
