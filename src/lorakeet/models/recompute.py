"""Layers that are computed again in the backward pass, so that only their inputs are kept.

    off        a layer keeps about 4 D + 2 Q + 2 K + 3 F numbers a token
    on         D, its input; the layer passes forward once more before its backward
    offload    nothing on the GPU: the input waits in main memory, pinned, until then

The work grows from 4 N to 6 N FLOP a token (LoRA), by a half at most.  Keeping everything in
main memory instead would be slower: what a layer keeps takes longer over PCIe than its forward
pass takes to compute; its input alone is thirty times less.

A layer finds the pack that it belongs to again (``packed.same_pack``) and the random numbers
that its dropout drew, so gradients are the same in every bit.

Legend: D hidden width, Q and K widths of queries and keys, F of the feed-forward part.
Source: arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import dropwhile
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lorakeet.models.packed import same_pack

OFF, ON, OFFLOAD = "off", "on", "offload"


@contextmanager
def recompute_layers(model: nn.Module, mode: str) -> Iterator[int]:
    """Inside, the model's layers are computed again in a backward pass.

    Key-value caches are off, as a second forward pass would add its keys to the first one's.

    Args:
        mode: ``off``, ``on`` or ``offload``; the backward pass belongs inside too.

    Yields:
        how many layers; 0 when off.
    """
    layers = [] if mode == OFF else _with_graph(find_layers(model))
    former = [layer.__dict__.get("forward") for layer in layers]
    configs = {id(m.config): m.config for m in model.modules() if layers and hasattr(m, "config")}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    for layer in layers:
        layer.forward = partial(_pass, layer.forward, mode)
    try:
        yield len(layers)
    finally:
        for config in caching:
            config.use_cache = True
        for layer, own in zip(layers, former, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.forward = own


def list_modes(model: nn.Module) -> tuple[str, ...]:
    """What saves more and more memory; beside a GPU there is a main memory to wait in."""
    return (ON, OFFLOAD) if next(model.parameters()).is_cuda else (ON,)


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The members of the largest stack of a model: the outermost list with most numbers."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(stacks, key=_count_numbers, default=()))


def _with_graph(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers from the first one that trains; those below keep nothing anyway."""
    return list(
        dropwhile(lambda layer: not any(p.requires_grad for p in layer.parameters()), layers)
    )


def _count_numbers(module: nn.Module) -> int:
    """Parameters and buffers, as quantised layers hold buffers."""
    return sum(t.numel() for t in (*module.parameters(), *module.buffers()))


def _pass(forward: Callable[..., Any], mode: str, *args: Any, **kwargs: Any) -> Any:
    """One layer's forward pass, of which only the inputs are kept."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    pins = torch.cuda.is_available()
    with save_on_cpu(pin_memory=pins) if mode == OFFLOAD else nullcontext():
        return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Nothing around the first pass, the pack of this moment around the second."""
    return nullcontext(), same_pack()
