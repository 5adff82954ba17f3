"""Frozen linear layers of a model held in 16 bits while it trains, without loss.

Attaching an adapter leaves a base that never changes; on a CPU it is computed in float32
though most checkpoints hold 16 bits. Each layer whose numbers fit is held as its checkpoint
holds it (``quant.narrow``). A layer that trains, is tied to another, or is the output head,
which is read whole, stays as it is; so does a layer with a number that needs more bits.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from lorakeet.adapters.attach import KINDS
from lorakeet.models.head import head_of
from lorakeet.models.heap import give_back
from lorakeet.quant.convert import replace_module
from lorakeet.quant.linear import Scratch
from lorakeet.quant.narrow import NarrowLinear, to_narrow

_OWN_FORM = {*KINDS, "original_module"}  # parts of a path: what adapters hold, or keep a copy of


def narrow_frozen(model: nn.Module) -> int:
    """Puts 16-bit layers in the place of frozen float32 ones on the CPU, in place.

    Returns:
        how many layers were replaced.

    Guarantees: every answer and gradient is the same, bit for bit.

    Cost: one layer in 16 bits beside the wide one at a time.
    """
    uses = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))
    head = head_of(model)
    inside_head = {id(each) for each in head.modules()} if head is not None else set()
    scratch, num_layers = Scratch(), 0
    for path, module in list(model.named_modules()):
        if id(module) in inside_head or _OWN_FORM & set(path.split(".")) or not _can_be(module):
            continue
        codes = to_narrow(module.weight) if uses[id(module.weight)] == 1 else None
        if codes is None:
            continue
        new = NarrowLinear(codes, module.bias, scratch=scratch, dtype=module.weight.dtype)
        replace_module(model, path, new.train(module.training))
        module.weight = None  # gives the wide one back before the next layer
        num_layers += 1
    _forget_wide(model)
    give_back()
    return num_layers


def _forget_wide(model: nn.Module) -> None:
    """Lets go of replaced weights that ``attach`` remembers as trained before it."""
    held = {id(each) for each in model.parameters()}
    kept = [each for each in getattr(model, "_lorakeet_trainable", ()) if id(each) in held]
    if hasattr(model, "_lorakeet_trainable"):
        model._lorakeet_trainable = kept


def _can_be(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, frozen, in float32 on the CPU."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    is_frozen = not any(each.requires_grad for each in module.parameters())
    return is_frozen and weight.dtype == torch.float32 and weight.device.type == "cpu"
