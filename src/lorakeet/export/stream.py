"""Merged weights written tensor by tensor, so that the model is never whole in memory.

    base shards (mapped files) ── W ──> W + s B A in float32 ──> dtype ──> output shards

The names and sizes of all tensors come from the model built without weights, so every
output file's head is written first and its tensors follow one at a time: what is held
is one tensor at its work in float32, never a shard.  The sums are those of
``adapters.merge``, operation by operation, so both ways give the same bits.

Tied embeddings: a weight under two names is written once, under the first.  When the
adapter changes one of the two, both are written and ``tie_word_embeddings`` becomes
False, as merging in memory does.

Cost: 4 bytes an element of the largest tensor for the sum, as many again where the base
is stored in 16 bits, and the converted tensor.
Source: the safetensors format (8 bytes of head length, JSON head, data).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lorakeet.base.errors import NumericsError
from lorakeet.base.run_folder import write_json
from lorakeet.export.fresh import sha256_tensor
from lorakeet.export.stream_plan import Piece, StreamPlan
from lorakeet.models.weight_files import INDEX, SINGLE, read_tensor
from lorakeet.quant.convert import quantize_weight
from lorakeet.quant.linear import expand

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_stream(plan: StreamPlan, folder: Path, *, max_shard_bytes: int) -> dict[str, str]:
    """Writes a plan's tensors, in one file or as shards with ``model.safetensors.index.json``.

    Returns:
        SHA-256 of each tensor before it was written, by name.

    Raises:
        NumericsError: a merged weight is not finite.
        FileFormatError: a file of the base is damaged.
        OSError: the disk is full.
    """
    shards = _to_shards(plan.pieces, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    digests: dict[str, str] = {}
    for file_name, pieces in zip(names, shards, strict=True):
        with (folder / file_name).open("wb") as file:
            _write_head(file, pieces)
            for piece in pieces:
                digests[piece.name] = _write_piece(file, merge_piece(piece, plan.files))
    if len(shards) > 1:
        places = {p.name: name for name, own in zip(names, shards, strict=True) for p in own}
        total = {"total_size": plan.num_bytes}
        write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(places.items()))})
    return digests


def merge_piece(piece: Piece, files: Mapping[str, Path]) -> Tensor:
    """One output tensor: W + s B A summed in float32, or W, or the adapter's own.

    Raises:
        NumericsError: it is not finite in the output's dtype.
        FileFormatError: the base's file is damaged.
    """
    base = (
        piece.saved if piece.saved is not None else read_tensor(files[piece.source], piece.source)
    )
    if piece.form is not None:
        base = _round(base, piece)
    if piece.layer is None:
        new = base if not base.is_floating_point() else base.float().to(piece.dtype)
        return new.contiguous()
    A, B = piece.layer.A.float(), piece.layer.B.float()
    change = (B @ A).mul_(piece.layer.scale)
    change = change.T if piece.is_transposed else change
    new = change.add_(base.float()).to(piece.dtype)
    if not torch.isfinite(torch.stack(torch.aminmax(new))).all():  # isfinite(new) would copy it
        raise NumericsError(
            f"{piece.name}: the merged weight would be NaN or infinite in {piece.dtype}. The "
            "adapter is damaged, or too large for this dtype; take an earlier checkpoint."
        )
    return new.contiguous()


def _round(base: Tensor, piece: Piece) -> Tensor:
    """The weight that training saw in a base of few bits, float32 in the base's layout."""
    weight = base.T if piece.is_transposed else base
    rounded = expand(quantize_weight(weight, piece.form), torch.float32)
    return rounded.T if piece.is_transposed else rounded


def _write_piece(file: BinaryIO, tensor: Tensor) -> str:
    """Writes a tensor's bytes; returns its digest, and holds nothing afterwards."""
    file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return sha256_tensor(tensor)


def _to_shards(pieces: tuple[Piece, ...], max_shard_bytes: int) -> list[list[Piece]]:
    """Pieces in their order, a new shard whenever the next would not fit."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.num_bytes
    # Wide types first, so that each tensor begins at a multiple of its element's size.
    return [sorted(own, key=lambda piece: -piece.dtype.itemsize) for own in shards]


def _write_head(file: BinaryIO, pieces: list[Piece]) -> None:
    """Names, types, shapes and places of the tensors that follow."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.num_bytes
        head[piece.name] = {
            "dtype": _NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
