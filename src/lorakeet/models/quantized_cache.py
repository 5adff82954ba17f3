"""The quantised base on disk, so that the next load maps a file instead of rounding again.

    <cache>/<key>/model.safetensors   codes, scales and the rest, in bitsandbytes' layout
                  config.json         with quantization_config: transformers opens one kind as well
                  cache.json          SHA-256 of the base, the settings, sizes of all files

The key is of the base's folder, the settings and the dtype.  Sizes and times of the base's
files say quickly that it is the same base; when they differ, its SHA-256 decides.  Mapped
pages are read as they are needed and can be given back to the system at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from lorakeet.base.errors import FileFormatError, MachineError
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.run_folder import read_json, sha256_folder, to_disk_error, write_json
from lorakeet.models.quantized import fill_quantized
from lorakeet.models.quantized_files import to_file_tensors, to_transformers_config
from lorakeet.models.stored_form import is_prequantized
from lorakeet.models.weight_files import SINGLE, find_tensors
from lorakeet.quant.linear import QuantizedLinear

FORMAT = 1
MANIFEST = "cache.json"
AUTO_BYTES = 1000**3  # smaller bases are quantised again in seconds
SPARE_BYTES = 64 * 1024**2


def load_quantized(
    model: nn.Module, folder: Path, settings: QuantizationSettings, *, dtype: torch.dtype
) -> None:
    """Fills a model on the meta device from the cache, or from the base's files.

    Args:
        folder: the base.

    Raises:
        FileFormatError, ShapeError, NumericsError, RequestError: as ``fill_quantized``.
        MachineError: the disk has no room for the cache.
    """
    place = None if is_prequantized(folder) else cache_place(folder, settings, model, dtype)
    if place is not None and is_fresh(place, folder):
        fill_quantized(model, place, QuantizationSettings(), dtype=dtype)
    else:
        fill_quantized(model, folder, settings, dtype=dtype)
        if place is not None:
            write_cache(model, place, folder, settings)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.rounds_inputs = settings.activations == "int8"


def cache_place(
    folder: Path, settings: QuantizationSettings, model: nn.Module, dtype: torch.dtype
) -> Path | None:
    """Where this quantised base is kept, or None when it is not kept."""
    home = find_home(folder, settings)
    if home is None:
        return None
    own = settings.describe_form()
    labels = getattr(model.config, "num_labels", 0)
    text = json.dumps(
        [FORMAT, str(folder.resolve()), own, str(dtype), type(model).__name__, labels]
    )
    key = f"{folder.name}-{settings.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return home / key


def find_home(folder: Path, settings: QuantizationSettings) -> Path | None:
    """The folder that keeps what is made of a base, or None when nothing is kept."""
    if settings.cache == "none":
        return None
    if settings.cache != "auto":
        return Path(settings.cache).expanduser()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Path.home() / ".cache" / "lorakeet" / "quantized" if size >= AUTO_BYTES else None


def is_fresh(place: Path, folder: Path) -> bool:
    """Whether a cache is whole and of this base as it lies on disk."""
    try:
        manifest = read_json(place / MANIFEST)
        whole = {name: (place / name).stat().st_size for name in manifest["files"]}
        find_tensors(place)
    except (FileFormatError, OSError, KeyError, TypeError):
        return False
    if whole != manifest["files"] or manifest.get("format") != FORMAT:
        return False
    if manifest["base_files"] == stamp_files(folder):
        return True
    if manifest["base_sha256"] != sha256_folder(folder):
        return False
    write_json(place / MANIFEST, {**manifest, "base_files": stamp_files(folder)})
    return True


def stamp_files(folder: Path) -> dict[str, list[int]]:
    """Size and time of each of the base's files that a load reads."""
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def write_cache(model: Any, place: Path, folder: Path, settings: QuantizationSettings) -> None:
    """Writes a quantised model whole or not at all; an older one at the place is replaced.

    Raises:
        MachineError: the disk has no room, or the folder cannot be written.
    """
    tensors = _collect(model)
    needed = sum(each.numel() * each.element_size() for each in tensors.values())
    beside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        if (free := shutil.disk_usage(beside).free) < needed + SPARE_BYTES:
            raise MachineError(
                f"{place}: the quantised base needs {needed:,} bytes and {free:,} are free. Free "
                "some space, or set quantization.cache to another folder or to none."
            )
        save_file(tensors, beside / SINGLE, metadata={"format": "pt"})
        _write_config(model, beside, settings)
        files = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
        write_json(
            beside / MANIFEST,
            {
                "format": FORMAT, "base": str(folder), "base_sha256": sha256_folder(folder),
                "base_files": stamp_files(folder), "files": files,
                "settings": settings.describe_form(),
            },
        )  # fmt: skip
        shutil.rmtree(place, ignore_errors=True)
        beside.rename(place)
    except OSError as error:
        raise to_disk_error(error, place, needed) from error
    except SafetensorError as error:
        raise MachineError(
            f"{place}: the quantised base cannot be written ({error}). Free some space, or set "
            "quantization.cache to none."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _collect(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model under the names of the file; what is tied, once."""
    tensors: dict[str, torch.Tensor] = {}
    inside = []
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            tensors |= to_file_tensors(module.quantized, path)
            inside.append(f"{path}.")
            if module.bias is not None:
                tensors[f"{path}.bias"] = module.bias
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(tuple(inside)) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write_config(model: Any, folder: Path, settings: QuantizationSettings) -> None:
    """config.json and generation_config.json, with what transformers must know."""
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    content = model.config.to_dict()
    content["architectures"] = [type(model).__name__]
    kind = "nf4" if settings.kind == "mixed" else settings.kind  # no name of theirs for a mix
    content["quantization_config"] = to_transformers_config(
        kind, is_double=settings.double, plain=plain
    )
    write_json(folder / "config.json", json.loads(json.dumps(content, default=str)))
