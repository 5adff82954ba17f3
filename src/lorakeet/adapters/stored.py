"""An adapter folder as its factors, read and written without any model.

    adapter_config.json          r, alpha and their patterns -> the scale s of each layer
    adapter_model.safetensors    A and B of each layer; everything else as it is
    lorakeet.json                hashes and lineage

This is what combining and comparing work on: a layer's change is s B A, whatever the
base.  Files are checked as strictly as when an adapter is attached.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorakeet.adapters.files import read_adapter_config
from lorakeet.adapters.folders import LINEAGE, check_replaceable, publish_folder, to_write_error
from lorakeet.adapters.low_rank import LowRank
from lorakeet.adapters.manifest import find_changed, write_manifest
from lorakeet.adapters.peft_config import CONFIG, VERA, from_peft_config
from lorakeet.adapters.settings import Lora
from lorakeet.adapters.weights import WEIGHTS, read_weights, weight_files
from lorakeet.base.errors import FileFormatError
from lorakeet.base.run_folder import read_json, sha256_file, write_json

_FACTOR = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_embedding_[AB])(\.weight)?")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """One layer's factors as they lie in the file.

    Args:
        A: [r, in], or [r, in, height, width] of a convolution; any float dtype.
        B: [out, r], or [out, r, 1, 1].
        scale: s = alpha / r, or alpha / sqrt(r).
        is_embedding: whether the file calls them ``lora_embedding_A`` and ``B``.
    """

    A: Tensor
    B: Tensor
    scale: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    def to_change(self) -> LowRank:
        """s B A in float64, a convolution's kernel unfolded into its columns."""
        return LowRank(B=self.scale * self.B.double().flatten(1), A=self.A.double().flatten(1))


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """A whole adapter as it lies on the disk.

    Args:
        layers: module name -> its factors.
        others: tensors that are no factors (saved modules, biases) under the file's names.
        digests: file -> SHA-256 of its bytes.
        lineage: the content of ``lorakeet.json``; empty for PEFT's own adapters.
    """

    folder: Path
    config: dict[str, Any]
    settings: Lora
    layers: dict[str, StoredLayer]
    others: dict[str, Tensor]
    digests: dict[str, str]
    lineage: dict[str, Any]

    @property
    def base(self) -> str:
        """The base's name as the adapter gives it."""
        return str(self.config.get("base_model_name_or_path"))

    @property
    def beside_factors(self) -> list[str]:
        """What else changes its layers, so that a change is not s B A alone; mostly nothing."""
        config = self.config
        words = {"use_dora": "DoRA, W' = m V / ||V||", "lora_bias": "biases of its own factors"}
        found = [told for key, told in words.items() if config.get(key)]
        if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
            found.append(f"init_lora_weights {config['init_lora_weights']}, a changed base")
        odd = [key for key in self.others if ".lora_" in key]
        if config.get("use_dora"):
            odd = [key for key in odd if not key.endswith(".lora_magnitude_vector")]
        return found + ([f"tensors {some(odd)}"] if odd else [])

    @property
    def num_parameters(self) -> int:
        """Trained numbers: factors, and whatever else is kept with them."""
        factors = sum(layer.A.numel() + layer.B.numel() for layer in self.layers.values())
        return factors + sum(tensor.numel() for tensor in self.others.values())


def read_stored(folder: str | Path) -> StoredAdapter:
    """An adapter folder, its bytes checked against its own hashes.

    Raises:
        FileFormatError: no adapter, damaged bytes, NaN or infinity, a factor without its
            partner or of another rank, or adapters of stacked parameters.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    if config.get("peft_type") == VERA:
        raise FileFormatError(
            f"{folder}: this is a VeRA adapter. Each layer takes a part of its shared A and B that "
            "only the base tells, so it has no factors to show, compare or combine alone. Merge "
            "it with 'lorakeet merge', or train a LoRA adapter."
        )
    settings = from_peft_config(config, folder)
    lineage = read_lineage(folder)
    files = (CONFIG, *weight_files(folder))
    digests = {file: sha256_file(folder / file) for file in files}
    problems = find_changed(folder, lineage, files)
    if config.get("target_parameters"):
        problems.append(
            "its factors belong to experts stacked in one parameter (target_parameters), which "
            "merging, serving and training take, and this does not"
        )
    try:
        tensors = read_weights(folder)
    except FileFormatError as error:
        problems.append(str(error).rstrip("."))
        tensors = {}
    layers, others = _sort_tensors(tensors, settings, problems)
    if problems:
        raise FileFormatError(f"{folder}: {'; '.join(problems)}. Take a whole LoRA adapter.")
    return StoredAdapter(
        folder=folder, config=config, settings=settings, layers=layers, others=others,
        digests=digests, lineage=lineage,
    )  # fmt: skip


def read_lineage(folder: Path) -> dict[str, Any]:
    """The content of ``lorakeet.json``, or nothing where PEFT wrote the adapter."""
    content = read_json(folder / LINEAGE) if (folder / LINEAGE).is_file() else {}
    if not isinstance(content, dict):
        raise FileFormatError(f"{folder / LINEAGE}: this is no JSON object; take it from a copy.")
    return content


def write_stored(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    lineage: Mapping[str, Any],
) -> Path:
    """Writes an adapter folder whole or not at all; an older adapter there is replaced.

    Raises:
        RequestError: the folder holds other files.
        FileFormatError: a tensor is not finite; nothing is written.
        MachineError: the disk is full.
    """
    folder = Path(folder)
    check_replaceable(folder)
    if bad := _not_finite(tensors):
        raise FileFormatError(f"{some(bad)}: NaN or infinity; such an adapter is not written.")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            beside / WEIGHTS,
            metadata={"format": "pt"},
        )
        write_json(beside / CONFIG, dict(config))
        base = config.get("base_model_name_or_path")
        write_manifest(beside, (CONFIG, WEIGHTS), base=base, lineage=lineage)
        publish_folder(beside, folder)
    except (OSError, SafetensorError) as error:
        needed = sum(t.numel() * t.element_size() for t in tensors.values())
        raise to_write_error(error, folder, needed) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def to_file_layers(layers: Mapping[str, StoredLayer]) -> dict[str, Tensor]:
    """Factors under the file's names."""
    tensors = {}
    for module, layer in layers.items():
        kind, end = ("lora_embedding_", "") if layer.is_embedding else ("lora_", ".weight")
        tensors[f"base_model.model.{module}.{kind}A{end}"] = layer.A
        tensors[f"base_model.model.{module}.{kind}B{end}"] = layer.B
    return tensors


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _sort_tensors(
    tensors: Mapping[str, Tensor], settings: Lora, problems: list[str]
) -> tuple[dict[str, StoredLayer], dict[str, Tensor]]:
    """Pairs of factors by module, and the rest; what is wrong is added to the problems."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if found := _FACTOR.fullmatch(key):
            pairs.setdefault(found[1], {})[found[2]] = tensor
        else:
            others[key] = tensor
    if bad := _not_finite(tensors):
        problems.append(f"NaN or infinity in {some(bad)}")
    if tensors and not pairs:
        problems.append("no layer has factors A and B")
    layers = {}
    for module, pair in sorted(pairs.items()):
        layer = _pair_layer(module, pair, settings)
        if isinstance(layer, str):
            problems.append(layer)
        else:
            layers[module] = layer
    return layers, others


def _pair_layer(module: str, pair: Mapping[str, Tensor], settings: Lora) -> StoredLayer | str:
    """A layer of its two factors, or what is wrong with them."""
    is_embedding = any("embedding" in kind for kind in pair)
    stem = "lora_embedding_" if is_embedding else "lora_"
    A, B = pair.get(f"{stem}A"), pair.get(f"{stem}B")
    if A is None or B is None or len(pair) != 2:
        return f"{module} has only {', '.join(sorted(pair))}, needed are A and B"
    r = settings.rank_of(module)
    if A.dim() < 2 or B.dim() != A.dim() or A.shape[0] != r or B.shape[1] != r:
        return f"{module}: A {list(A.shape)} and B {list(B.shape)} are not of rank {r}"
    return StoredLayer(A=A, B=B, scale=settings.scale_of(module), is_embedding=is_embedding)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinity."""
    return [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
