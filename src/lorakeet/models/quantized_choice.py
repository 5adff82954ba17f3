"""Which layers of a model are held in few bits, and in which form."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from lorakeet.adapters.layer import is_linear, sizes_of
from lorakeet.adapters.targets import linear_names
from lorakeet.base.errors import RequestError, ShapeError
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.quant.convert import QuantizedForm


def choose_forms(model: nn.Module, settings: QuantizationSettings) -> dict[str, QuantizedForm]:
    """The layers that are held in few bits, in the model's order, with the form of each.

    Raises:
        RequestError: a pattern selects nothing, or widths are missing or name no layer.
    """
    if not settings.is_on:
        return {}
    names = select_quantized(model, settings)
    if settings.kind != "mixed":
        return dict.fromkeys(names, to_form(settings.kind, settings))
    if not settings.widths:
        raise RequestError(
            "quantization.kind mixed: widths is empty. 'lorakeet train' measures it on the "
            "recipe's data and writes it to resolved.yaml; elsewhere take it from there."
        )
    if odd := sorted(settings.widths.keys() - set(names)):
        raise RequestError(
            f"quantization.widths: {len(odd)} names are no layers in few bits of this model, such "
            f"as {odd[0]}. Take the widths of a run on the same base, or leave them out."
        )
    forms = {name: to_form(settings.widths.get(name, "none"), settings) for name in names}
    return {name: form for name, form in forms.items() if form is not None}


def to_form(width: str, settings: QuantizationSettings) -> QuantizedForm | None:
    """The form that a width such as ``nf4/256`` names; None for ``none``."""
    kind, _, block_size = width.partition("/")
    if kind == "none":
        return None
    K = int(block_size or settings.block_size)
    return QuantizedForm(kind=kind, block_size=K, double=settings.double)


def select_quantized(model: nn.Module, settings: QuantizationSettings) -> list[str]:
    """The names of the linear layers that are held in few bits, in the model's order.

    Raises:
        RequestError: a pattern selects nothing, or nothing is left.
    """
    every = [name for name, module in model.named_modules() if is_linear(module)]
    shared = _tied_names(model)
    wanted = linear_names(model)
    if settings.include != "all-linear":
        wanted = [name for name in every if _matches(name, settings.include)]
        if tied := [name for name in wanted if name in shared]:
            raise RequestError(
                f"quantization.include: {tied[0]} shares its weight with the embedding, which is "
                "looked up in full precision. Take it out."
            )
    if settings.exclude and not any(_matches(name, settings.exclude) for name in every):
        raise RequestError(f"quantization.exclude: {_told(settings.exclude, every)}")
    kept = [name for name in wanted if not (settings.exclude and _matches(name, settings.exclude))]
    if not kept:
        raise RequestError(f"quantization.include: {_told(settings.include, every)}")
    return kept


def check_blocks(model: nn.Module, forms: Mapping[str, QuantizedForm]) -> None:
    """Whether blocks divide every chosen layer.

    Raises:
        ShapeError: some they do not; all are counted.
    """
    bad = []
    for name, form in forms.items():
        num_in, num_out = sizes_of(model.get_submodule(name))
        if form.kind != "int8" and num_in * num_out % form.block_size:
            bad.append(f"{name} ({num_out} x {num_in})")
    if bad:
        sizes = sorted({form.block_size for form in forms.values()})
        raise ShapeError(
            f"{len(bad)} layers cannot be cut into blocks of {', '.join(map(str, sizes))}: "
            f"{', '.join(bad[:3])}. Choose a smaller quantization.block_size, kind int8, or name "
            "them in quantization.exclude."
        )


def _tied_names(model: nn.Module) -> set[str]:
    """Linear layers whose weight is another module's too."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _matches(name: str, pattern: str | tuple[str, ...]) -> bool:
    """A name whose parts stand anywhere in the full name, or an expression over all of it."""
    if isinstance(pattern, str):
        return bool(re.fullmatch(pattern, name)) or _matches(name, (pattern,))
    return any(f".{key}." in f".{name}." for key in pattern)


def _told(pattern: str | tuple[str, ...], names: list[str]) -> str:
    asked = pattern if isinstance(pattern, str) else ", ".join(pattern)
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    return (
        f"'{asked}' leaves no linear layer of this model to act on. They end in "
        f"{', '.join(endings)}."
    )
