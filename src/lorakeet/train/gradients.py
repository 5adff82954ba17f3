"""Gradients at places of their own, away from what a backward pass lets go.

On a CPU a gradient is born where an activation has just been; there it would stay until the
step's end, and cut the room of the next micro-batch into pieces that its arrays do not fill.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakeet.base.units import MIB

MOST_BYTES = 128 * MIB  # more, as in full training, are not worth a second home in every step


def build_places(parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """One array a parameter on a CPU, untouched until it is used; none for many, or elsewhere."""
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if num_bytes > MOST_BYTES or any(parameter.device.type != "cpu" for parameter in parameters):
        return ()
    return tuple(torch.empty_like(parameter, requires_grad=False) for parameter in parameters)


def move_gradients(parameters: Sequence[nn.Parameter], places: Sequence[Tensor]) -> None:
    """Puts each gradient into its place, where later micro-batches add to it.

    Guarantees: no number changes, and a parameter without a gradient has none afterwards.
    """
    for parameter, place in zip(parameters, places, strict=False):
        if parameter.grad is not None:
            parameter.grad = place.copy_(parameter.grad)
