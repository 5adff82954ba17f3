"""Putting wrappers in the places of layers, and the layers' own objects back."""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from lorakeet.adapters.bias import BiasLayer, add_bias
from lorakeet.adapters.convolution import LoraConv2d
from lorakeet.adapters.embedding import LoraEmbedding
from lorakeet.adapters.experts import LoraExperts, is_stacked, wrapper_of
from lorakeet.adapters.layer import LoraLayer, SavedModule, is_linear
from lorakeet.adapters.linear import LoraLinear
from lorakeet.base.errors import RequestError

WRAPPERS = (LoraLayer, SavedModule, BiasLayer)
_BOTH = (
    "{path}: one adapter adapts it and another trains it in full, which one model cannot hold at "
    "a time. Attach them to two models, or detach the other first."
)


def build_layer(module: nn.Module) -> LoraLayer:
    """The wrapper that fits a base layer.

    Raises:
        RequestError: the module is of another kind.
    """
    if isinstance(module, nn.Embedding):
        return LoraEmbedding(module)
    if is_linear(module):
        return LoraLinear(module)
    if isinstance(module, nn.Conv2d):
        return LoraConv2d(module)
    raise RequestError(
        f"{type(module).__name__} cannot carry a LoRA adapter; linear layers, Conv1D, Conv2d and "
        "embeddings can. Name it in modules_to_save to train it in full."
    )


def wrap_layer(model: nn.Module, path: str) -> LoraLayer:
    """The wrapper at a place, made when it is not there yet.

    Raises:
        RequestError: the module cannot be adapted, or another adapter trains it in full.
    """
    if is_stacked(model, path):
        return _wrap_stacked(model, path)
    module = model.get_submodule(path)
    if isinstance(module, LoraLayer):
        return module
    if isinstance(module, SavedModule):
        raise RequestError(_BOTH.format(path=path))
    layer = build_layer(module)
    layer.train(module.training)
    replace_module(model, path, layer)
    return layer


def _wrap_stacked(model: nn.Module, target: str) -> LoraExperts:
    """The wrapper of a stacked parameter, around those of the module's other ones."""
    if (known := wrapper_of(model, target)) is not None:
        return known
    path, _, parameter_name = target.rpartition(".")
    module = model.get_submodule(path)
    layer = LoraExperts(module, parameter_name)
    layer.train(module.training)
    replace_module(model, path, layer)
    return layer


def wrap_biased(model: nn.Module, path: str, name: str) -> None:
    """An adapter's own bias at a place.

    Raises:
        RequestError: another adapter trains the module in full.
    """
    module = model.get_submodule(path)
    if not isinstance(module, BiasLayer):
        try:
            module = wrap_layer(model, path)
        except RequestError:
            if isinstance(module, SavedModule):
                raise
            module, base = BiasLayer(module), module
            module.train(base.training)
            replace_module(model, path, module)
    add_bias(module, name)


def wrap_saved(model: nn.Module, path: str, name: str) -> None:
    """A trained copy of a module beside the original.

    Raises:
        RequestError: another adapter adapts the module or what lies in it.
    """
    module = model.get_submodule(path)
    if any(isinstance(each, (LoraLayer, BiasLayer)) for each in module.modules()):
        raise RequestError(_BOTH.format(path=path))
    if not isinstance(module, SavedModule):
        module = SavedModule(module)
        module.train(module.original_module.training)
        replace_module(model, path, module)
    copy = deepcopy(module.original_module)
    module.modules_to_save[name] = copy.float() if _is_floating(copy) else copy


def remove_adapters(model: nn.Module, names: list[str]) -> None:
    """Takes adapters out of every wrapper, and away the wrappers that hold none."""
    for path, module in reversed(list(model.named_modules())):  # inner ones first
        if not isinstance(module, WRAPPERS):
            continue
        for each in module.names & set(names):
            module.remove(each)
        if not module.names:
            is_saved = isinstance(module, SavedModule)
            base = module.original_module if is_saved else module.base_layer
            replace_module(model, path, base)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Another module in a place."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _is_floating(module: nn.Module) -> bool:
    return all(p.is_floating_point() for p in module.parameters())
