"""Adapters on disk in PEFT's format, and the only file that knows its names.

    adapter_config.json         the settings, PEFT's keys
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight and its like
    lorakeet.json               SHA-256 of both, base and lineage: ours

Reading is strict in both directions: a missing, unexpected, misshapen or non-finite
tensor refuses the whole adapter with the list of reasons.  A pickle is never opened.

Source: the PEFT 0.21 checkpoint format document.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakeet.adapters.attach import adapter_parameters, attach, detach, set_active, settings_of
from lorakeet.adapters.layer import is_conv1d
from lorakeet.adapters.settings import Lora
from lorakeet.base.errors import FileFormatError, RequestError
from lorakeet.base.run_folder import read_json, sha256_file, to_disk_error

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LINEAGE = "lorakeet.json"
_PREFIX = "base_model.model."
_SHOWN = 5
_UNREADABLE = {"use_dora": "DoRA", "use_qalora": "QALoRA", "lora_bias": "a bias on B"}


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
        RequestError: there is no such adapter.
        FileFormatError: a tensor is not finite; nothing is written.
        MachineError: the disk is full.
    """
    if name not in settings_of(model):
        raise RequestError(f"no adapter '{name}' is attached, so there is nothing to write.")
    folder = Path(folder)
    tensors = to_file_tensors(model, name)
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise FileFormatError(f"{_some(bad)}: NaN or infinity; such an adapter is not written.")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        _write(beside / CONFIG, to_peft_config(model, name, base))
        files = {file: sha256_file(beside / file) for file in (CONFIG, WEIGHTS)}
        _write(beside / LINEAGE, {"format": 1, "base": base, "files": files, **(lineage or {})})
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        needed = sum(t.numel() * t.element_size() for t in tensors.values())
        raise to_disk_error(error, folder, needed) from error
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
        FileFormatError: the folder holds no adapter, its bytes are damaged, or it does
            not fit this model; the model is then unchanged.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    settings = from_peft_config(config, folder)
    _verify_hashes(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    try:
        attach(model, settings, name=name)
    except RequestError as error:
        raise FileFormatError(f"{folder}: this adapter does not fit the base. {error}") from error
    try:
        _fill(model, name, tensors, folder)
    except FileFormatError:
        detach(model, name)
        raise
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(trainable)
    set_active(model, name)
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
    if not (folder / WEIGHTS).is_file():
        pickles = [path.name for path in folder.glob("*.bin")] + [
            p.name for p in folder.glob("*.pt")
        ]
        found = f"only a pickle ({pickles[0]}), which is never opened" if pickles else "no weights"
        raise FileFormatError(f"{folder}: found {found}; needed is {WEIGHTS}.")
    return read_json(folder / CONFIG)


def to_file_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under the names of the file, on the CPU."""
    return {
        to_file_name(path, name): parameter.detach().cpu().contiguous().clone()
        for path, parameter in adapter_parameters(model, name).items()
    }


def to_file_name(path: str, name: str) -> str:
    """A parameter's name in the file: no adapter name, no wrapper names.

    >>> to_file_name("h.0.c_attn.lora_A.default.weight", "default")
    'base_model.model.h.0.c_attn.lora_A.weight'
    >>> to_file_name("score.modules_to_save.default.weight", "default")
    'base_model.model.score.weight'
    """
    path = path.replace(".base_layer.", ".").replace(f".modules_to_save.{name}.", ".")
    return _PREFIX + f"{path}.".replace(f".{name}.", ".").rstrip(".")


def to_peft_config(model: nn.Module, name: str, base: str) -> dict[str, Any]:
    """The settings under PEFT's keys, with the targets listed by full name."""
    settings = settings_of(model)[name]
    layers = {
        path: module.base_layer
        for path, module in model.named_modules()
        if name in getattr(module, "ranks", {})
    }
    is_classifier = hasattr(model, "num_labels") and "Sequence" in type(model).__name__
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(layers),
        "exclude_modules": None,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "modules_to_save": list(settings.modules_to_save) or None,
        "use_rslora": settings.rslora,
        "use_dora": False,
        "fan_in_fan_out": any(is_conv1d(layer) for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def from_peft_config(config: Mapping[str, Any], folder: Path) -> Lora:
    """The settings behind PEFT's keys.

    Raises:
        FileFormatError: another kind of adapter, or an option that changes the
            mathematics in a way that is not known here.
    """
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')}, needed is LORA")
    problems += [f"{word} ({key})" for key, word in _UNREADABLE.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(f"trained biases (bias: {config['bias']})")
    if config.get("layers_to_transform") is not None:
        problems.append("layers_to_transform")
    if problems:
        raise FileFormatError(f"{folder}/{CONFIG}: cannot be used here: {'; '.join(problems)}.")
    targets = config.get("target_modules") or ()
    try:
        return Lora(
            rank=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout") or 0.0,
            targets=targets if isinstance(targets, str) else tuple(targets),
            exclude=tuple(config.get("exclude_modules") or ()),
            rslora=bool(config.get("use_rslora")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            modules_to_save=tuple(config.get("modules_to_save") or ()),
        )  # fmt: skip
    except (KeyError, TypeError, RequestError) as error:
        raise FileFormatError(f"{folder}/{CONFIG}: a wrong or missing value: {error}") from error


def _fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copies tensors into the attached adapter, or lists every reason why not."""
    wanted = {to_file_name(p, name): t for p, t in adapter_parameters(model, name).items()}
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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path}: not a whole safetensors file ({error}).") from error


def _verify_hashes(folder: Path) -> None:
    """Compares the bytes with the manifest, when there is one (PEFT writes none)."""
    if not (folder / LINEAGE).is_file():
        return
    for file, digest in read_json(folder / LINEAGE).get("files", {}).items():
        if sha256_file(folder / Path(file).name) != digest:
            raise FileFormatError(
                f"{folder / file}: its bytes are not those that were written (SHA-256 differs). "
                "Take the adapter from a copy."
            )


def _write(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
