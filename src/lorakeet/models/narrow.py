"""Frozen linear layers of a model held in 16 bits while it trains, without loss.

Attaching an adapter leaves a base that never changes; on a CPU it is computed in float32
though most checkpoints hold 16 bits. Each layer whose numbers fit is held as its checkpoint
holds it (``quant.narrow``), and so are the embedding and the output head, tied or not, where
the loss reads the head block by block. A layer that trains or is tied to another stays as it
is; so does a layer with a number that needs more bits.  A base that was read as stored
(``models.stored``) is in 16 bits already, and what of it must be wide is widened here.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from lorakeet.adapters.attach import KINDS
from lorakeet.models.head import head_of, read_head_facts, soft_cap_of
from lorakeet.models.heap import give_back
from lorakeet.quant.convert import replace_module
from lorakeet.quant.linear import Scratch
from lorakeet.quant.narrow import NARROW, NarrowEmbedding, NarrowHead, NarrowLinear, to_narrow

_OWN_FORM = {*KINDS, "original_module"}  # parts of a path: what adapters hold, or keep a copy of


def narrow_frozen(model: nn.Module) -> int:
    """Puts 16-bit layers in the place of frozen ones on the CPU, in place; the rest in float32.

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
        new = NarrowLinear(codes, module.bias, scratch=scratch, dtype=torch.float32)
        replace_module(model, path, new.train(module.training))
        module.weight = None  # gives the wide one back before the next layer
        num_layers += 1
    _widen_rest(model)
    num_layers += _narrow_ends(model, uses, scratch)
    _forget_wide(model)
    give_back()
    return num_layers


def _narrow_ends(model: nn.Module, uses: Counter[int], scratch: Scratch) -> int:
    """The embedding and the head in 16 bits, which share their codes where they are tied."""
    table, head = model.get_input_embeddings(), head_of(model)
    ends = [each for each in (table, head) if each is not None and _can_be_end(model, each)]
    paths = {id(module): path for path, module in model.named_modules()}
    shared: dict[int, torch.Tensor | None] = {}
    num_ends = 0
    for end in ends:
        key = id(end.weight)
        if uses[key] != sum(each.weight is end.weight for each in ends):
            continue
        if key not in shared:
            shared[key] = to_narrow(end.weight)
        codes, dtype = shared[key], torch.float32
        if codes is None or _OWN_FORM & set(paths[id(end)].split(".")):
            continue
        new: nn.Module = (
            NarrowEmbedding(codes, end.padding_idx, dtype=dtype)
            if end is table
            else NarrowHead(codes, end.bias, scratch=scratch, dtype=dtype)
        )
        replace_module(model, paths[id(end)], new.train(end.training))
        num_ends += 1
    return num_ends


def _can_be_end(model: nn.Module, end: nn.Module) -> bool:
    """Whether a module is a plain embedding, or a head that the loss reads block by block."""
    if type(end) is nn.Embedding:
        return _is_frozen(end) and end.max_norm is None
    reads_blocks = soft_cap_of(model) is None and _can_be(end)
    return reads_blocks and read_head_facts(model).is_plain


def _widen_rest(model: nn.Module) -> None:
    """Weights on a CPU that are still in 16 bits in float32: tied, bent or trained ones."""
    for parameter in model.parameters():
        if parameter.dtype in NARROW and parameter.device.type == "cpu":
            parameter.data = parameter.data.float()


def _forget_wide(model: nn.Module) -> None:
    """Lets go of replaced weights that ``attach`` remembers as trained before it."""
    held = {id(each) for each in model.parameters()}
    kept = [each for each in getattr(model, "_lorakeet_trainable", ()) if id(each) in held]
    if hasattr(model, "_lorakeet_trainable"):
        model._lorakeet_trainable = kept


def _can_be(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, frozen, on the CPU."""
    return type(module) is nn.Linear and _is_frozen(module)


def _is_frozen(module: nn.Module) -> bool:
    """Whether nothing of a module trains, and it is on the CPU, without hooks."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    is_known = module.weight.dtype in (torch.float32, *NARROW)
    is_here = module.weight.device.type == "cpu"
    return is_known and is_here and not any(p.requires_grad for p in module.parameters())
