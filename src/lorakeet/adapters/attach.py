"""Attaching adapters to a model, switching between them, and taking them off again.

Attaching replaces a layer by a wrapper that holds the layer's own object; detaching
puts that object back, so the model is exactly what it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

from torch import nn

from lorakeet.adapters.layer import LoraLayer, SavedModule, build_layer
from lorakeet.adapters.settings import Lora
from lorakeet.adapters.targets import ends_with, select_targets
from lorakeet.base.errors import RequestError


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
    depend on the order of anything.

    Raises:
        RequestError: the name is taken, nothing matches, or a rank is too large; the
            model is then unchanged.
    """
    if name in adapter_names(model):
        raise RequestError(
            f"the model already has an adapter '{name}'. Detach it first, or choose another name."
        )
    targets = select_targets(model, settings)
    saved = _select_saved(model, settings, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        for target in targets:
            layer = _wrap(model, target)
            layer.add(name, settings, target, _seed_of(seed, target))
        for target in saved:
            _wrap_saved(model, target, name)
    except RequestError:
        detach(model, name)
        raise
    settings_of(model)[name] = settings
    set_active(model, name)
    trained = adapter_parameters(model, name)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return AttachReport(
        targets={t: _count(model.get_submodule(t), name) for t in targets},
        trained_parameters=sum(p.numel() for p in trained.values()),
        total_parameters=sum(p.numel() for p in model.parameters()),
    )


def detach(model: nn.Module, name: str | None = None) -> None:
    """Takes an adapter (or all of them) off; layers without any get their own object back."""
    names = adapter_names(model) if name is None else [name]
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            for each in names:
                if each in module.ranks:
                    module.remove(each)
            if not module.ranks:
                _replace(model, path, module.base_layer)
        elif isinstance(module, SavedModule):
            for each in names:
                if each in module.modules_to_save:
                    del module.modules_to_save[each]
            module.active = None if module.active in names else module.active
            if not len(module.modules_to_save):
                _replace(model, path, module.original_module)
    for each in names:
        settings_of(model).pop(each, None)


def set_active(model: nn.Module, name: str | None) -> None:
    """Makes one adapter answer, or with None the base alone.

    Raises:
        RequestError: there is no adapter of that name.
    """
    if name is not None and name not in adapter_names(model):
        known = ", ".join(adapter_names(model)) or "none"
        raise RequestError(f"no adapter '{name}' is attached; attached are: {known}.")
    for layer in _wrappers(model):
        held = layer.ranks if isinstance(layer, LoraLayer) else layer.modules_to_save
        layer.active = name if name in held else None


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that answers, or None."""
    return next((layer.active for layer in _wrappers(model) if layer.active), None)


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
    """Every parameter of an adapter by its full name: A, B and copies of saved modules."""
    return {
        path: parameter
        for path, parameter in model.named_parameters(remove_duplicate=False)
        if is_of_adapter(path, name)
    }


def is_of_adapter(path: str, name: str) -> bool:
    """Whether a parameter's full name belongs to an adapter."""
    kinds = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save")
    return any(f".{kind}.{name}." in f".{path}." for kind in kinds)


def _wrappers(model: nn.Module) -> Iterator[LoraLayer | SavedModule]:
    return (m for m in model.modules() if isinstance(m, (LoraLayer, SavedModule)))


def _select_saved(model: nn.Module, settings: Lora, targets: list[str]) -> list[str]:
    """The full names of ``modules_to_save``, the outermost of nested ones."""
    found = [
        path
        for path, module in model.named_modules()
        if path
        and any(ends_with(path, key) for key in settings.modules_to_save)
        and not isinstance(module, nn.ModuleDict)
    ]
    missing = [k for k in settings.modules_to_save if not any(ends_with(p, k) for p in found)]
    if missing:
        tops = ", ".join(n for n, _ in model.named_children())
        raise RequestError(
            f"modules_to_save {', '.join(missing)}: the model has no such module. At the top it "
            f"has {tops}."
        )
    inside = [t for t in targets if any(t == p or t.startswith(f"{p}.") for p in found)]
    if inside:
        raise RequestError(
            f"{inside[0]} is adapted and lies in modules_to_save; a module is adapted or trained "
            "in full, not both."
        )
    return [p for p in found if not any(p.startswith(f"{outer}.") for outer in found)]


def _wrap(model: nn.Module, path: str) -> LoraLayer:
    """The wrapper at a place, made when it is not there yet."""
    module = model.get_submodule(path)
    if isinstance(module, LoraLayer):
        return module
    layer = build_layer(module)
    layer.train(module.training)
    _replace(model, path, layer)
    return layer


def _wrap_saved(model: nn.Module, path: str, name: str) -> None:
    """A trained copy of a module beside the original."""
    module = model.get_submodule(path)
    if not isinstance(module, SavedModule):
        module = SavedModule(module)
        module.train(module.original_module.training)
        _replace(model, path, module)
    copy = deepcopy(module.original_module)
    module.modules_to_save[name] = copy.float() if _is_floating(copy) else copy


def _is_floating(module: nn.Module) -> bool:
    return all(p.is_floating_point() for p in module.parameters())


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _seed_of(seed: int, path: str) -> int:
    """A seed of (seed, module name)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{path}".encode(), digest_size=7).digest(), "big")


def _count(layer: nn.Module, name: str) -> tuple[int, int]:
    A, B = layer.factors(name)
    return layer.ranks[name], A.numel() + B.numel()
