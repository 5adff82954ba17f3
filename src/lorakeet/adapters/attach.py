"""Attaching adapters to a model, switching between them, and taking them off again.

Attaching replaces a layer by a wrapper that holds the layer's own object; detaching
puts that object back, so the model is exactly what it was.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lorakeet.adapters.bias import BiasLayer, select_biased
from lorakeet.adapters.experts import layer_names
from lorakeet.adapters.layer import LoraLayer, SavedModule
from lorakeet.adapters.settings import Lora
from lorakeet.adapters.targets import check_layers, check_ranks, select_saved, select_targets
from lorakeet.adapters.vera import share_projections
from lorakeet.adapters.wrap import (
    WRAPPERS,
    remove_adapters,
    wrap_biased,
    wrap_layer,
    wrap_saved,
)
from lorakeet.base.errors import RequestError
from lorakeet.quant.convert import count_weights

KINDS = (
    "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_E",
    "lora_magnitude_vector", "vera_lambda_d", "vera_lambda_b", "modules_to_save", "trained_bias",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_TAKEN = frozenset(dir(nn.ModuleDict())) | frozenset(dir(nn.ParameterDict()))


@dataclass(frozen=True, kw_only=True)
class AttachReport:
    """What was attached.

    Args:
        targets: module name -> (r, trained parameters).
    """

    targets: dict[str, tuple[int, int]]
    trained_parameters: int
    total_parameters: int


def attach(
    model: nn.Module, settings: Lora, *, name: str = "default", seed: int = 0
) -> AttachReport:
    """Adds an adapter to a model in place, freezes the base, and makes the adapter active.

    A of each layer is drawn from a generator of (seed, module name), so it does not
    depend on the order of anything.  Other adapters are left as they are.

    Args:
        name: letters, digits, ``_`` and ``-``.

    Raises:
        RequestError: the name is taken or malformed, an adapter is merged, nothing
            matches, or a rank is too large; the model is then unchanged.
    """
    targets = find_targets(model, settings)
    return attach_to(model, settings, targets, name=name, seed=seed)


def find_targets(model: nn.Module, settings: Lora) -> list[str]:
    """The modules that ``attach`` would adapt; a model on torch's meta device will do.

    Raises:
        RequestError: as ``attach``, for whatever names and sizes tell.
    """
    targets = select_targets(model, settings)
    check_layers(settings, targets)
    check_ranks(model, settings, targets)
    select_saved(model, settings, targets)
    return targets


def attach_to(
    model: nn.Module, settings: Lora, targets: list[str], *, name: str, seed: int = 0
) -> AttachReport:
    """``attach`` at given modules and at any rank; a sum of adapters may have a high one.

    Raises:
        RequestError: as ``attach``.
    """
    _check_name(model, name)
    _check_unmerged(model, None)
    saved = select_saved(model, settings, targets)
    biased = select_biased(model, settings.bias, targets, saved)
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        layers = [wrap_layer(model, target) for target in targets]
        for target, layer in zip(targets, layers, strict=True):
            layer.add(name, settings, target, _seed_of(seed, target))
        if settings.vera is not None:
            share_projections(layers, name, settings.vera)
        for target in saved:
            wrap_saved(model, target, name)
        for target in biased:
            wrap_biased(model, target, name)
    except RequestError:
        remove_adapters(model, [name])
        raise
    if not adapter_names(model):
        model._lorakeet_trainable = trainable
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    settings_of(model)[name] = settings
    set_active(model, name)
    trained = adapter_parameters(model, name)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return report_of(model, name)


def report_of(model: nn.Module, name: str = "default") -> AttachReport:
    """What an attached adapter holds."""
    layers = {path: layer for path, layer in layer_names(model) if name in layer.ranks}
    return AttachReport(
        targets={path: _count(layer, name) for path, layer in layers.items()},
        trained_parameters=sum(p.numel() for p in adapter_parameters(model, name).values()),
        total_parameters=count_weights(model),
    )


def detach(model: nn.Module, name: str | None = None) -> None:
    """Takes an adapter (or all of them) off; layers without any get their own object back.

    With the last adapter the base's ``requires_grad`` flags return too.  A merged
    adapter leaves its change in the base for good: this is how a merged model is made.

    Raises:
        RequestError: there is no adapter of that name.
    """
    if name is not None:
        _check_known(model, name)
    names = adapter_names(model) if name is None else [name]
    if merged_adapter(model) in names:
        model.__dict__.pop("_lorakeet_tied", None)  # the merged weights stay untied
    remove_adapters(model, names)
    for each in names:
        del settings_of(model)[each]
    if names and not adapter_names(model):
        for parameter in model.__dict__.pop("_lorakeet_trainable", ()):
            parameter.requires_grad_(True)


def set_active(model: nn.Module, name: str | None) -> None:
    """Makes one adapter answer, or with None the base alone.

    Raises:
        RequestError: there is no adapter of that name, or another one is merged, so
            that the base does not hold its own weights.
    """
    if name is not None:
        _check_known(model, name)
    _check_unmerged(model, name)
    for layer in _wrappers(model):
        layer.active = name if name in layer.names else None


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that answers, or None."""
    return next((layer.active for layer in _wrappers(model) if layer.active), None)


def merged_adapter(model: nn.Module) -> str | None:
    """The adapter whose change is in the base weights, or None."""
    return next((layer.merged for layer in _wrappers(model) if layer.merged), None)


@contextmanager
def no_adapter(model: nn.Module) -> Iterator[None]:
    """The base alone inside a with block; the former adapter afterwards."""
    former = active_adapter(model)
    set_active(model, None)
    try:
        yield
    finally:
        set_active(model, former)


def adapter_names(model: nn.Module) -> list[str]:
    """The attached adapters, in the order of their arrival."""
    return list(settings_of(model))


def settings_of(model: nn.Module) -> dict[str, Lora]:
    """The settings of each attached adapter; the dictionary itself, kept on the model."""
    if not hasattr(model, "_lorakeet_adapters"):
        model._lorakeet_adapters = {}
    return model._lorakeet_adapters


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Every parameter of an adapter by its full name: A, B, biases and saved modules."""
    return {
        path: parameter
        for path, parameter in model.named_parameters(remove_duplicate=False)
        if is_of_adapter(path, name)
    }


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What belongs into an adapter's file: its parameters, and buffers of saved modules."""
    tensors: dict[str, Tensor] = dict(adapter_parameters(model, name))
    for path, module in model.named_modules():
        if isinstance(module, SavedModule) and name in module.modules_to_save:
            own = module.modules_to_save[name].state_dict(keep_vars=True)
            tensors |= {f"{path}.modules_to_save.{name}.{key}": each for key, each in own.items()}
    return tensors


def is_of_adapter(path: str, name: str) -> bool:
    """Whether a parameter's full name belongs to an adapter."""
    return any(f".{kind}.{name}." in f".{path}." for kind in KINDS)


def _wrappers(model: nn.Module) -> Iterator[LoraLayer | SavedModule | BiasLayer]:
    return (m for m in model.modules() if isinstance(m, WRAPPERS))


def _check_name(model: nn.Module, name: str) -> None:
    """A name must be usable as a key of torch's module tables, and free."""
    if name in adapter_names(model):
        raise RequestError(
            f"the model already has an adapter '{name}'. Detach it first, or choose another name."
        )
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise RequestError(
            f"'{name}' cannot name an adapter; needed are letters, digits, '_' and '-', and no "
            "word that torch's module tables use themselves. Choose another name."
        )


def _check_known(model: nn.Module, name: str) -> None:
    if name not in adapter_names(model):
        known = ", ".join(adapter_names(model)) or "none"
        raise RequestError(f"no adapter '{name}' is attached; attached are: {known}.")


def _check_unmerged(model: nn.Module, name: str | None) -> None:
    """Nothing but the adapter of that name may be merged."""
    merged = merged_adapter(model)
    if merged is not None and merged != name:
        raise RequestError(
            f"adapter '{merged}' is merged, so the base does not hold its own weights. "
            "Unmerge it first."
        )


def _seed_of(seed: int, path: str) -> int:
    """A seed of (seed, module name)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{path}".encode(), digest_size=7).digest(), "big")


def _count(layer: LoraLayer, name: str) -> tuple[int, int]:
    return layer.ranks[name], layer.num_trained(name)
