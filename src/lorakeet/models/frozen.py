"""The layers below the first that trains: what they answer never changes during a run.

    h_L = layer_L( ... layer_1(embedding(ids)))      the same in every epoch

So h_L can be kept, and put in place of these layers when the same tokens come again.
Which layers these are is read from the parameters, and that the rest of the model needs
nothing else of them is not guessed: a model is asked once, with its own layers and with
their kept answer, and both must be the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.models.head import backbone_of, count_ids, evaluation_mode

_PROBE_TOKENS = 6
_FAILURES = (TypeError, ValueError, AttributeError, IndexError, RuntimeError, KeyError)


@dataclass(frozen=True, kw_only=True)
class FrozenPart:
    """The lowest layers of a model, of which none trains.

    Args:
        layers: from the first one up.
        num_layers: of the whole model.
        is_tuple: whether a layer answers a tuple of one.
        width: of their answer; ``dtype`` is its type.
    """

    layers: tuple[nn.Module, ...]
    num_layers: int
    is_tuple: bool
    width: int
    dtype: torch.dtype


def find_frozen_part(model: nn.Module) -> FrozenPart | str:
    """The layers below the first that trains, or a sentence why their answers cannot be kept.

    Cost: two forward passes over six tokens.
    """
    stack = _find_stack(model)
    if stack is None:
        return "the model has no single stack of layers."
    trains = [any(p.requires_grad for p in layer.parameters()) for layer in stack]
    num_frozen = trains.index(True) if any(trains) else 0
    if num_frozen == 0:
        return "the first layer trains already; method.layers can adapt upper layers only."
    lower = tuple(stack)[:num_frozen]
    if _drops(model, stack, lower):
        return "the model's frozen part draws dropout anew at every step."
    return _prove(model, lower, len(stack)) or (
        "the layers above need more of the frozen ones than their answer."
    )


@contextmanager
def captured(part: FrozenPart) -> Iterator[list[Tensor]]:
    """Inside, the frozen layers' answer is put into the list that this yields."""
    seen: list[Tensor] = []
    handle = part.layers[-1].register_forward_hook(
        lambda module, inputs, output: seen.append(_first(output).detach())
    )
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def replaced(part: FrozenPart, states: Tensor) -> Iterator[None]:
    """Inside, the frozen layers compute nothing and answer ``states``."""
    for layer in part.layers:
        answer = partial(_answer, states if layer is part.layers[-1] else None, part.is_tuple)
        layer.forward = answer
    try:
        yield
    finally:
        for layer in part.layers:
            del layer.forward


def _answer(
    states: Tensor | None, is_tuple: bool, hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    found = hidden if states is None else states
    return (found,) if is_tuple else found


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _find_stack(model: nn.Module) -> nn.ModuleList | None:
    """The list of the model's layers, as long as its configuration says."""
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0] if len(lists) == 1 else None


def _drops(model: nn.Module, stack: nn.ModuleList, lower: tuple[nn.Module, ...]) -> bool:
    """Whether a frozen layer, or anything outside the stack, drops values while it trains."""
    upper = {id(m) for layer in tuple(stack)[len(lower) :] for m in layer.modules()}
    return any(
        value > 0
        for module in model.modules()
        if id(module) not in upper
        for name, value in vars(module).items()
        if isinstance(value, float) and (isinstance(module, nn.Dropout) or "drop" in name)
    )


def _prove(model: nn.Module, lower: tuple[nn.Module, ...], num_layers: int) -> FrozenPart | None:
    """The part, if the model answers the same with its layers and with their kept answer."""
    num_ids = count_ids(model)
    device = next(model.parameters()).device
    ids = (torch.arange(_PROBE_TOKENS, device=device) * 7 % (num_ids // 2) + num_ids // 2)[None]
    outputs: list[Any] = []
    handle = lower[-1].register_forward_hook(lambda m, i, output: outputs.append(output))
    try:
        with evaluation_mode(model):
            expected = backbone_of(model)(input_ids=ids)[0].detach()
            output, states = outputs[0], _first(outputs[0])
            if states.requires_grad or (isinstance(output, tuple) and len(output) != 1):
                return None
            part = FrozenPart(
                layers=lower, num_layers=num_layers, is_tuple=isinstance(output, tuple),
                width=states.shape[-1], dtype=states.dtype,
            )  # fmt: skip
            with replaced(part, states):
                found = backbone_of(model)(input_ids=ids)[0].detach()
    except _FAILURES:
        return None
    finally:
        handle.remove()
    return part if torch.equal(found, expected) else None
