"""Folding an adapter into its base, and taking it out again.

    W' = W0 + (alpha / r) B A            summed in float32, then cast to W0's dtype
    W' = m V / ||V||_c                   DoRA's, with V = W0 + (alpha / r) B A

The original weight is kept aside in memory, so ``unmerge`` restores it bit for bit.
A weight that is tied to another module (an embedding and the head) is untied first,
as the adapter was trained on one of the two only; ``unmerge`` ties it again.

Source: arXiv:2106.09685, section 4.1 (no additional inference latency).
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from lorakeet.adapters.attach import adapter_names, merged_adapter, set_active
from lorakeet.adapters.bias import BiasLayer
from lorakeet.adapters.layer import LoraLayer, SavedModule
from lorakeet.base.errors import NumericsError, RequestError
from lorakeet.quant.linear import QuantizedLinear


def merge(model: nn.Module, name: str = "default") -> None:
    """Adds an adapter's change to the base weights in place, and makes it the active one.

    Raises:
        RequestError: there is no such adapter, one is merged already, or the base is quantised.
        NumericsError: a merged weight is not finite; the base keeps its own weights.

    Cost: a copy of every adapted weight stays in memory until ``unmerge`` or ``detach``.
    """
    if name not in adapter_names(model):
        raise RequestError(f"no adapter '{name}' is attached, so there is nothing to merge.")
    if (merged := merged_adapter(model)) is not None:
        raise RequestError(f"adapter '{merged}' is merged already. Unmerge it first.")
    _refuse_quantized(model, name)
    set_active(model, name)
    untie_adapted(model, name)
    try:
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer) and name in module.ranks:
                _merge_layer(module, name, path)
            if isinstance(module, (LoraLayer, BiasLayer)) and name in module.trained_bias:
                _merge_bias(module, name)
            if isinstance(module, SavedModule) and name in module.modules_to_save:
                _use_saved(module, name)
    except NumericsError:
        unmerge(model)
        raise


def _refuse_quantized(model: nn.Module, name: str) -> None:
    """A base of 4 or 8 bits cannot hold the sum without rounding the change away.

    Raises:
        RequestError: the adapter changes quantised layers.
    """
    quantized = [
        path
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and name in module.ranks
        and isinstance(module.base_layer, QuantizedLinear)
    ]
    if quantized:
        raise RequestError(
            f"{quantized[0]} and {len(quantized) - 1} more of the adapted layers are quantised, "
            "and rounding W0 + s B A would lose the change. Merge into the full base, which "
            "'lorakeet merge' does, or expand this one first with dequantize_model."
        )


def unmerge(model: nn.Module) -> None:
    """Puts the kept weights back, bit for bit; does nothing when nothing is merged."""
    if merged_adapter(model) is None and not hasattr(model, "_lorakeet_tied"):
        return
    for module in list(model.modules()):
        if isinstance(module, (LoraLayer, BiasLayer)) and module.merged is not None:
            _restore(module)
        elif isinstance(module, SavedModule) and module.merged is not None:
            module.original_module = module.kept[0]
            module.merged, module.kept = None, ()
    _tie_again(model)


def untie_adapted(model: nn.Module, name: str) -> None:
    """Gives the head its own weight where an adapted embedding and the head share one.

    The model's ``tie_word_embeddings`` is set to False, so that saving keeps both.
    """
    ends = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    bare = [_bare(end) for end in ends]
    if None in bare or bare[0].weight is not bare[1].weight:
        return
    if any(name in _adapters_on(end) for end in ends):
        shared = bare[1].weight
        model._lorakeet_tied = (shared, model.config.tie_word_embeddings)
        bare[1].weight = nn.Parameter(shared.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _tie_again(model: nn.Module) -> None:
    """Gives the head the shared weight back that ``untie_adapted`` took."""
    if hasattr(model, "_lorakeet_tied"):
        head = _bare(model.get_output_embeddings())
        head.weight, model.config.tie_word_embeddings = model._lorakeet_tied
        del model._lorakeet_tied


def _merge_layer(layer: LoraLayer, name: str, path: str) -> None:
    """One layer's W'."""
    weight = layer.weight
    new = layer.new_weight(name).to(weight.dtype)
    if not torch.isfinite(new).all():
        raise NumericsError(
            f"{path}: the merged weight would be NaN or infinite in {weight.dtype}. The adapter "
            "is damaged, or too large for this dtype; take an earlier checkpoint."
        )
    layer.kept_weight = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(new)
    layer.merged = name


def _merge_bias(layer: LoraLayer | BiasLayer, name: str) -> None:
    """The trained bias in the place of the base's."""
    bias = layer.base_layer.bias
    layer.kept_bias = bias.detach().clone()
    with torch.no_grad():
        bias.copy_(layer.trained_bias[name])
    layer.merged = name


@torch.no_grad()
def _restore(layer: LoraLayer | BiasLayer) -> None:
    """The kept weight and bias, bit for bit."""
    if getattr(layer, "kept_weight", None) is not None:
        layer.weight.copy_(layer.kept_weight)
        layer.kept_weight = None
    if layer.kept_bias is not None:
        layer.base_layer.bias.copy_(layer.kept_bias)
        layer.kept_bias = None
    layer.merged = None


def _use_saved(module: SavedModule, name: str) -> None:
    """A copy of the trained module, in the base's dtype, stands for the original."""
    dtype = next(module.original_module.parameters()).dtype
    trained = deepcopy(module.modules_to_save[name]).to(dtype).requires_grad_(False)
    module.kept, module.original_module = (module.original_module,), trained
    module.merged = name


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
