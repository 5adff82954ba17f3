"""Adapters on disk in PEFT's format; ``file_names`` knows what its tensors are called.

    adapter_config.json         the settings, PEFT's keys
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight and its like
    lorakeet.json               SHA-256 of both, base and lineage: ours

Reading is strict in both directions: a missing, unexpected, misshapen or non-finite
tensor refuses the whole adapter with the list of reasons.  A pickle is never opened.

Source: the PEFT 0.21 checkpoint format document.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakeet.adapters.attach import (
    active_adapter,
    adapter_names,
    adapter_parameters,
    attach_to,
    detach,
    set_active,
    settings_of,
)
from lorakeet.adapters.file_names import to_file_names, to_file_tensors, without_base
from lorakeet.adapters.folders import LINEAGE, check_replaceable, publish_folder, to_write_error
from lorakeet.adapters.manifest import find_changed, write_manifest
from lorakeet.adapters.peft_config import CONFIG, from_peft_config, to_peft_config
from lorakeet.adapters.plain import PREFIX, read_adalora
from lorakeet.adapters.settings import Lora
from lorakeet.adapters.targets import ends_with, is_inside, select_targets
from lorakeet.adapters.vera import with_projections
from lorakeet.adapters.weights import WEIGHTS, read_weights, weight_files
from lorakeet.base.errors import FileFormatError, RequestError
from lorakeet.base.run_folder import read_json, write_json

_SHOWN = 5


def write_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    base: str,
    lineage: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an adapter whole or not at all; an older one at the place is replaced.

    Args:
        base: what ``base_model_name_or_path`` will say.
        lineage: plain values for ``lorakeet.json``.

    Raises:
        RequestError: there is no such adapter, or the folder holds other files than one.
        FileFormatError: a tensor is not finite; nothing is written.
        MachineError: the disk is full.
    """
    if name not in settings_of(model):
        raise RequestError(f"no adapter '{name}' is attached, so there is nothing to write.")
    folder = Path(folder)
    check_replaceable(folder)
    if reserved := {"format", "base", "files", "seal"} & set(lineage or {}):
        raise RequestError(f"lineage holds {', '.join(sorted(reserved))}, which are set here.")
    tensors = to_file_tensors(model, name)
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise FileFormatError(f"{_some(bad)}: NaN or infinity; such an adapter is not written.")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        write_json(beside / CONFIG, to_peft_config(model, name, base))
        write_manifest(beside, (CONFIG, WEIGHTS), base=base, lineage=lineage or {})
        publish_folder(beside, folder)
    except (OSError, SafetensorError) as error:
        needed = sum(t.numel() * t.element_size() for t in tensors.values())
        raise to_write_error(error, folder, needed) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def read_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
) -> Lora:
    """Attaches an adapter from disk and makes it active.

    Args:
        trainable: False freezes it, for inference.

    Returns:
        its settings.

    Raises:
        RequestError: the name is taken.
        FileFormatError: the folder holds no adapter, its bytes are damaged, or it does
            not fit this model; the model is then unchanged.
    """
    folder = Path(folder)
    if name in adapter_names(model):
        raise RequestError(f"the model already has an adapter '{name}'. Detach it first.")
    config = read_adapter_config(folder)
    _verify_hashes(folder)
    tensors = read_weights(folder)
    if config.get("peft_type") == "ADALORA":
        config, tensors = read_adalora(config, tensors)
    settings = from_peft_config(config, folder)
    former = active_adapter(model)
    try:
        settings = _to_fitting(model, settings, tensors)
        attach_to(model, settings, list(settings.targets), name=name)
    except RequestError as error:
        raise FileFormatError(f"{folder}: this adapter does not fit the base. {error}") from error
    try:
        _fill(model, name, with_projections(model, name, config, tensors), folder)
    except FileFormatError:
        detach(model, name)
        set_active(model, former)
        raise
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(trainable)
    return settings


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's ``adapter_config.json``.

    Raises:
        FileFormatError: the folder is no adapter, or holds a pickle only.
    """
    if not (folder / CONFIG).is_file():
        raise FileFormatError(
            f"{folder}: there is no {CONFIG}, so this is no adapter. A run keeps its adapter in "
            "the folder 'adapter'."
        )
    if not weight_files(folder):
        pickles = [path.name for path in folder.glob("*.bin")] + [
            p.name for p in folder.glob("*.pt")
        ]
        found = f"only a pickle ({pickles[0]}), which is never opened" if pickles else "no weights"
        raise FileFormatError(f"{folder}: found {found}; needed is {WEIGHTS}.")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise FileFormatError(f"{folder / CONFIG}: this is no JSON object, so it is no adapter.")
    return config


def _to_fitting(model: nn.Module, settings: Lora, tensors: Mapping[str, Tensor]) -> Lora:
    """PEFT's reading of names: it adds heads a model lacks, and matches ends without a dot."""
    paths = [path for path, _ in model.named_modules() if path]
    saved = {p for p in paths for key in settings.modules_to_save if ends_with(p, key)}
    loose = {p for p in paths for key in settings.modules_to_save if p.endswith(key)} - saved
    saved |= {p for p in loose if any(key.startswith(f"{PREFIX}{p}.") for key in tensors)}
    absent = {k for k in settings.modules_to_save if not any(ends_with(p, k) for p in paths)}
    targets = [t for t in _select_as_peft(model, settings, paths) if not is_inside(t, list(saved))]
    kept = (*sorted(saved), *sorted(absent - {"classifier", "score"}))
    return replace(settings, targets=tuple(targets), exclude=(), modules_to_save=kept)


def _select_as_peft(model: nn.Module, settings: Lora, paths: list[str]) -> list[str]:
    """The targets of a file; PEFT lets ``layers`` choose among endings, not among full names."""
    targets = settings.targets
    full = [] if isinstance(targets, str) else [name for name in targets if name in paths]
    if not settings.layers or not full:
        return select_targets(model, settings)
    anywhere = replace(settings, targets=tuple(full), layers=(), layers_pattern=())
    found = select_targets(model, anywhere)
    if endings := tuple(name for name in targets if name not in full):
        found += select_targets(model, replace(settings, targets=endings))
    return list(dict.fromkeys(found))


def _fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copies tensors into the attached adapter, or lists every reason why not."""
    wanted = to_file_names(model, name)
    tensors = without_base(model, wanted, tensors)
    missing, odd = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    shared = sorted(wanted.keys() & tensors.keys())
    shapes = [
        f"{key} is {tuple(tensors[key].shape)}, needed {tuple(wanted[key].shape)}"
        for key in shared
        if tensors[key].shape != wanted[key].shape
    ]
    broken = [key for key in shared if not torch.isfinite(tensors[key].float()).all()]
    problems = [f"missing: {_some(missing)}"] if missing else []
    problems += [f"unexpected: {_some(odd)}"] if odd else []
    problems += [f"wrong shape: {_some(shapes)}"] if shapes else []
    problems += [f"NaN or infinity: {_some(broken)}"] if broken else []
    if problems:
        raise FileFormatError(
            f"{folder}: this adapter does not fit the model or is damaged; " + "; ".join(problems)
            + ". Take the adapter that was trained on this base."
        )  # fmt: skip
    with torch.no_grad():
        for key in shared:
            wanted[key].copy_(tensors[key])


def _verify_hashes(folder: Path) -> None:
    """Compares the bytes with the manifest, when there is one (PEFT writes none)."""
    content = read_json(folder / LINEAGE) if (folder / LINEAGE).is_file() else {}
    if not isinstance(content, dict):
        raise FileFormatError(f"{folder / LINEAGE}: this is no JSON object; take it from a copy.")
    if wrong := find_changed(folder, content, (CONFIG, *weight_files(folder))):
        raise FileFormatError(f"{folder}: {'; '.join(wrong)}. Take the adapter from a copy.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
