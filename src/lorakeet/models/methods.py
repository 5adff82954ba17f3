"""The table of training methods: what each one trains and what it leaves on disk."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

import lorakeet.models.transformers_code  # noqa: F401  before any other import of transformers
from lorakeet.adapters.attach import attach, find_targets, report_of
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.folders import LINEAGE, check_replaceable, publish_folder, to_write_error
from lorakeet.adapters.settings import LOFTQ, AdaLora, Lora
from lorakeet.adapters.targets import HEAD_NAMES, is_inside
from lorakeet.base.errors import FileFormatError
from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.recipe import Recipe
from lorakeet.base.run_folder import sha256_file, write_json
from lorakeet.models.load import build_without_weights
from lorakeet.models.loftq import start_on_errors
from lorakeet.models.quiet import no_bars

VERA_SEED = 0  # PEFT's default key, so that A and B are those of other adapters of its size


@dataclass(frozen=True, kw_only=True)
class MethodReport:
    """What a method trains.

    Args:
        targets: adapted module -> r; empty for full fine-tuning.
    """

    trained_parameters: int
    total_parameters: int
    targets: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    Args:
        options: what a recipe's section ``method`` says to get it.
        apply: prepares a model for training, in place.
        write: leaves the result in a folder.
        source: the paper.
    """

    options: Mapping[str, Any]
    apply: Callable[..., MethodReport]
    write: Callable[..., None]
    source: str


def apply_method(
    model: nn.Module, settings: MethodSettings, *, task: str, seed: int, base: str | None = None
) -> MethodReport:
    """Freezes and attaches what a recipe's method asks for.

    Args:
        base: what the model was loaded from; ``start: loftq`` reads its full weights.

    Raises:
        RequestError: targets or ranks do not fit the model.
    """
    report = _row_of(settings).apply(model, settings, task=task, seed=seed)
    if settings.start == LOFTQ and base is not None:
        start_on_errors(model, base, task=task, seed=seed)
    return report


def check_method(recipe: Recipe) -> None:
    """Passes a recipe whose targets and ranks fit its base, told by config.json alone.

    So a wrong name is told in a second, and not after a large base has been loaded.

    Raises:
        RequestError: as ``apply_method``.
    """
    if recipe.method.kind == "lora" and recipe.method.adapter is None:
        model = build_without_weights(recipe.base, task=recipe.task)
        find_targets(model, to_lora(recipe.method, model, task=recipe.task))


def write_trained(
    model: nn.Module,
    settings: MethodSettings,
    folder: Path,
    base: str,
    lineage: Mapping[str, Any],
) -> None:
    """Writes what was trained: an adapter folder, or after full training a whole model.

    Raises:
        MachineError: the disk is full.
        FileFormatError: a tensor is not finite.
    """
    _row_of(settings).write(model, folder, base, lineage)


def to_lora(settings: MethodSettings, model: nn.Module, *, task: str) -> Lora:
    """The adapter of a recipe; a new classification head is always trained and saved."""
    saved, inside = list(settings.modules_to_save), []
    if task == "classify":
        children = [name for name, _ in model.named_children()]
        heads = [name for name in children if name in HEAD_NAMES and name not in saved]
        saved += heads
        # Layers inside the head are trained in full, so a target such as "dense" passes them over.
        inside = [path for path, _ in model.named_modules() if is_inside(path, heads)]
    budget = AdaLora(**settings.adalora.model_dump()) if settings.adalora else None
    return Lora(
        rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout,
        targets=settings.targets, exclude=_add_names(settings.exclude, inside),
        layers=tuple(range(settings.layers[0], settings.layers[1] + 1)) if settings.layers else (),
        rslora=settings.rslora,
        rank_pattern=settings.rank_pattern, alpha_pattern=settings.alpha_pattern,
        modules_to_save=tuple(saved), bias=settings.bias, dora=settings.dora,
        start=settings.start, adalora=budget, vera=VERA_SEED if settings.vera else None,
    )  # fmt: skip


def _add_names(exclude: str | tuple[str, ...], names: list[str]) -> str | tuple[str, ...]:
    """What is excluded and some names more; an expression stays one."""
    if not isinstance(exclude, str):
        return (*exclude, *names)
    return "|".join((f"(?:{exclude})", *(re.escape(name) for name in names)))


def _apply_lora(
    model: nn.Module, settings: MethodSettings, *, task: str, seed: int
) -> MethodReport:
    if settings.adapter is not None:
        read_adapter(model, settings.adapter, trainable=True)
        report = report_of(model)
    else:
        report = attach(model, to_lora(settings, model, task=task), seed=seed)
    return MethodReport(
        trained_parameters=report.trained_parameters,
        total_parameters=report.total_parameters,
        targets={name: r for name, (r, _) in report.targets.items()},
    )


def _apply_full(
    model: nn.Module, settings: MethodSettings, *, task: str, seed: int
) -> MethodReport:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    total = sum(parameter.numel() for parameter in model.parameters())
    return MethodReport(trained_parameters=total, total_parameters=total, targets={})


def _write_lora(model: nn.Module, folder: Path, base: str, lineage: Mapping[str, Any]) -> None:
    write_adapter(model, folder, base=base, lineage=lineage)


def _write_full(model: nn.Module, folder: Path, base: str, lineage: Mapping[str, Any]) -> None:
    """The whole model as safetensors, with hashes and lineage, put in place by a rename."""
    check_replaceable(folder)
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise FileFormatError(
            f"{bad[0]} and {len(bad) - 1} more: NaN or infinity; such a model is not written. Take "
            "an earlier checkpoint."
        )
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with no_bars():
            model.save_pretrained(beside)
        files = {path.name: sha256_file(path) for path in sorted(beside.iterdir())}
        write_json(beside / LINEAGE, {**lineage, "format": 1, "base": base, "files": files})
        publish_folder(beside, folder)
    except (OSError, SafetensorError) as error:
        needed = sum(p.numel() * p.element_size() for p in model.parameters())
        raise to_write_error(error, folder, needed) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _row_of(settings: MethodSettings) -> Method:
    """The row that applies and writes; options of LoRA share LoRA's two functions."""
    return METHODS[settings.kind]


def _adapter(source: str, **options: Any) -> Method:
    """A row of the LoRA family."""
    return Method(
        options={"kind": "lora", **options}, apply=_apply_lora, write=_write_lora, source=source
    )


METHODS: dict[str, Method] = {
    "lora": _adapter("arXiv:2106.09685"),
    "rslora": _adapter("arXiv:2312.03732", rslora=True),
    "lora+": _adapter("arXiv:2402.12354", lora_plus_ratio=16.0),
    "dora": _adapter("arXiv:2402.09353", dora=True),
    "pissa": _adapter("arXiv:2404.02948", start="pissa"),
    "pissa-fast": _adapter("arXiv:2404.02948", start="pissa-fast"),
    "dora on pissa": _adapter("arXiv:2402.09353, arXiv:2404.02948", dora=True, start="pissa"),
    "loftq": _adapter("arXiv:2310.08659", start="loftq"),
    "adalora": _adapter("arXiv:2303.10512", adalora={"target_rank": 2}),
    "vera": _adapter("arXiv:2310.11454", vera=True),
    "lora and biases": _adapter("arXiv:2106.09685, arXiv:2106.10199", bias="all"),
    "full": Method(
        options={"kind": "full"}, apply=_apply_full, write=_write_full, source="all weights"
    ),
}
