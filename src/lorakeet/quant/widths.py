"""Mixed widths: a budget of bytes spent on the layers whose rounding hurts most.

Each layer can be held in several forms, each with its bytes and what it costs in loss.
All layers start in their smallest form.  Then, again and again, the change that saves the
most loss for each byte is made, among those that the budget still has room for:

    ratio = (cost before - cost after) / (bytes after - bytes before)

Layers are taken as independent, so the costs add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorakeet.base.errors import RequestError
from lorakeet.quant.convert import QuantizedForm
from lorakeet.quant.scales import SCALES_PER_BLOCK


@dataclass(frozen=True, kw_only=True)
class Option:
    """One form of one layer.

    Args:
        num_bytes: of codes and scales.
        cost: loss that it adds, in nats a token.
    """

    num_bytes: int
    cost: float


def count_bytes(shape: tuple[int, int], form: QuantizedForm | None, plain_bytes: int) -> int:
    """Bytes of a weight [out, in] in a form.

    Args:
        form: None leaves the weight as it is.
        plain_bytes: of an element that is left.

    >>> count_bytes((64, 256), QuantizedForm(double=False), 4)
    9216
    """
    num_out, num = shape[0], shape[0] * shape[1]
    if form is None:
        return num * plain_bytes
    if form.kind == "int8":
        return num + 4 * num_out
    scales = num // form.block_size
    if not form.double:
        return num // 2 + 4 * scales
    return num // 2 + scales + 4 * math.ceil(scales / SCALES_PER_BLOCK) + 4


def choose_widths(layers: Mapping[str, Mapping[str, Option]], max_bytes: float) -> dict[str, str]:
    """The form of each layer that saves the most loss within a budget, greedily.

    Args:
        layers: layer -> form -> what it takes and costs.

    Raises:
        RequestError: even the smallest forms take more.

    >>> small, large = Option(num_bytes=4, cost=2.0), Option(num_bytes=8, cost=0.0)
    >>> mild = {"nf4": Option(num_bytes=4, cost=0.5), "int8": large}
    >>> choose_widths({"a": mild, "b": {"nf4": small, "int8": large}}, 12)
    {'a': 'nf4', 'b': 'int8'}
    """
    chosen = {name: min(forms, key=lambda f: forms[f].num_bytes) for name, forms in layers.items()}
    room = max_bytes - sum(layers[name][form].num_bytes for name, form in chosen.items())
    if room < 0:
        raise RequestError(
            f"the smallest forms of all layers take {max_bytes - room:,.0f} bytes, and the budget "
            f"is {max_bytes:,.0f}. Raise quantization.bits_per_weight."
        )
    while change := _find_best(layers, chosen, room):
        name, form, num_bytes = change
        chosen[name] = form
        room -= num_bytes
    return chosen


def _find_best(
    layers: Mapping[str, Mapping[str, Option]], chosen: Mapping[str, str], room: float
) -> tuple[str, str, int] | None:
    """Layer, form and additional bytes of the change with the largest ratio, if one fits."""
    best, best_ratio = None, 0.0
    for name, forms in layers.items():
        now = forms[chosen[name]]
        for form, option in forms.items():
            added, saved = option.num_bytes - now.num_bytes, now.cost - option.cost
            if 0 < added <= room and saved > best_ratio * added:
                best, best_ratio = (name, form, added), saved / added
    return best
