"""Folding an adapter into its base, and taking it out again.

    W' = W0 + (alpha / r) B A            summed in float32, then cast to W0's dtype

The original weight is kept aside in memory, so ``unmerge`` restores it bit for bit.
A weight that is tied to another module (an embedding and the head) is untied first,
as the adapter was trained on one of the two only.
"""

from __future__ import annotations

import torch
from torch import nn

from lorakeet.adapters.attach import adapter_names
from lorakeet.adapters.layer import LoraLayer, SavedModule
from lorakeet.base.errors import NumericsError, RequestError


def merge(model: nn.Module, name: str = "default") -> None:
    """Adds an adapter's change to the base weights in place.

    Raises:
        RequestError: there is no such adapter, or one is merged already.
        NumericsError: a merged weight is not finite; nothing is changed.
    """
    if name not in adapter_names(model):
        raise RequestError(f"no adapter '{name}' is attached, so there is nothing to merge.")
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and name in m.ranks]
    if any(layer.merged is not None for layer in layers):
        raise RequestError("an adapter is merged already. Unmerge it first.")
    untie_adapted(model, name)
    changed = []
    for layer in layers:
        weight = layer.base_layer.weight
        new = (weight.detach().float() + layer.change(name).detach()).to(weight.dtype)
        if not torch.isfinite(new).all():
            raise NumericsError(
                "a merged weight would be NaN or infinite. The adapter is damaged; take an "
                "earlier checkpoint."
            )
        changed.append(new)
    for layer, new in zip(layers, changed, strict=True):
        layer.kept_weight = layer.base_layer.weight.detach().clone()
        with torch.no_grad():
            layer.base_layer.weight.copy_(new)
        layer.merged = name
    _use_saved(model, name)


def unmerge(model: nn.Module) -> None:
    """Puts the kept weights back, bit for bit; does nothing when nothing is merged."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer.merged is not None:
            with torch.no_grad():
                layer.base_layer.weight.copy_(layer.kept_weight)
            layer.merged, layer.kept_weight = None, None
        elif isinstance(layer, SavedModule) and hasattr(layer, "kept_module"):
            layer.original_module = layer.kept_module
            del layer.kept_module


def untie_adapted(model: nn.Module, name: str) -> None:
    """Gives an adapted layer its own weight where embedding and head share one.

    The model's ``tie_word_embeddings`` is set to False, so that saving keeps both.
    """
    ends = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    bare = [_bare(end) for end in ends]
    if None in bare or bare[0].weight is not bare[1].weight:
        return
    if any(name in _adapters_on(end) for end in ends):
        bare[1].weight = nn.Parameter(bare[1].weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _bare(module: nn.Module | None) -> nn.Module | None:
    """A module without its wrapper."""
    if isinstance(module, LoraLayer):
        return module.base_layer
    return module.original_module if isinstance(module, SavedModule) else module


def _adapters_on(module: nn.Module | None) -> set[str]:
    """The adapters that change a module."""
    if isinstance(module, LoraLayer):
        return set(module.ranks)
    return set(module.modules_to_save) if isinstance(module, SavedModule) else set()


def _use_saved(model: nn.Module, name: str) -> None:
    """The trained copies stand for the originals of ``modules_to_save``."""
    for module in model.modules():
        if isinstance(module, SavedModule) and name in module.modules_to_save:
            module.kept_module = module.original_module
            dtype = next(module.original_module.parameters()).dtype
            module.original_module = module.modules_to_save[name].to(dtype)
