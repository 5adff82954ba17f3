"""Quantised weights in safetensors files, in the layout of bitsandbytes and transformers.

    X.weight                                  uint8 [N / 2, 1], two codes a byte; or int8 [out, in]
    X.weight.absmax                           float32 [N / K], or uint8 when they are quantised
    X.weight.quant_map                        float32 [16], the levels
    X.weight.nested_absmax, .nested_quant_map the scales' own scales and their 256 levels
    X.weight.quant_state.bitsandbytes__nf4    uint8, a JSON text: block size, shape, dtype, offset
    X.SCB                                     float32 [out], max |w| of each row of int8

Source: ``QuantState.as_dict`` of bitsandbytes 0.50 and transformers' quantization_config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.base.errors import FileFormatError
from lorakeet.models.weight_files import TensorFiles
from lorakeet.quant.int8 import Int8Weight
from lorakeet.quant.linear import Quantized
from lorakeet.quant.nf4 import LEVELS, Nf4Blocks
from lorakeet.quant.scales import SCALES_PER_BLOCK, QuantizedScales

STATE = "quant_state.bitsandbytes__"


def find_quantized(files: Mapping[str, Path]) -> dict[str, str]:
    """Module name -> ``nf4``, ``fp4`` or ``int8``, of all weights that a file holds quantised."""
    found = {}
    for name in files:
        module, _, kind = name.rpartition(f".weight.{STATE}")
        if module:
            found[module] = kind
        elif name.endswith(".SCB"):
            found[name.removesuffix(".SCB")] = "int8"
    return found


def read_quantized(files: TensorFiles, module: str, kind: str, dtype: torch.dtype) -> Quantized:
    """One quantised weight [out, in], mapped from its file.

    Args:
        dtype: that the weight will read as.

    Raises:
        FileFormatError: the file is damaged, or in a form that bitsandbytes never writes.
    """

    def read(name: str) -> Tensor:
        return files.read(f"{module}.{name}")

    codes = read("weight")
    if kind == "int8":
        if f"{module}.weight_format" in files.files and int(read("weight_format")) != 0:
            raise FileFormatError(
                f"{module}: its int8 codes are not stored row by row, as an old bitsandbytes did "
                "for some cards. Load the full-precision model and quantise it here."
            )
        return Int8Weight(codes=codes, scales=read("SCB").float() / 127, dtype=dtype)
    state = _read_state(read(f"weight.{STATE}{kind}"), module)
    scales: Tensor | QuantizedScales = read("weight.absmax")
    if "nested_offset" in state:
        scales = QuantizedScales(
            codes=scales, scales=read("weight.nested_absmax"),
            offset=torch.tensor(float(state["nested_offset"])),
            levels=read("weight.nested_quant_map"),
        )  # fmt: skip
    _check_state(state, kind, read("weight.quant_map"), module)
    return Nf4Blocks(
        codes=codes.contiguous().view(torch.uint8).view(-1), scales=scales,
        block_size=state["blocksize"], shape=tuple(state["shape"]), dtype=dtype, kind=kind,
    )  # fmt: skip


def to_file_tensors(weight: Quantized, module: str) -> dict[str, Tensor]:
    """A quantised weight under the names of its file."""
    if isinstance(weight, Int8Weight):
        return {
            f"{module}.weight": weight.codes,
            f"{module}.SCB": weight.scales * 127,  # divided by 127 again it is the same float32
            f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    state: dict[str, Any] = {
        "quant_type": weight.kind, "blocksize": weight.block_size, "dtype": _name_of(weight.dtype),
        "shape": list(weight.shape),
    }  # fmt: skip
    levels = torch.tensor(LEVELS[weight.kind])
    tensors = {f"{module}.weight": weight.codes.view(-1, 1), f"{module}.weight.quant_map": levels}
    if isinstance(weight.scales, QuantizedScales):
        state |= {
            "nested_blocksize": SCALES_PER_BLOCK, "nested_dtype": "float32",
            "nested_offset": weight.scales.offset.item(),
        }  # fmt: skip
        tensors[f"{module}.weight.absmax"] = weight.scales.codes
        tensors[f"{module}.weight.nested_absmax"] = weight.scales.scales
        tensors[f"{module}.weight.nested_quant_map"] = weight.scales.levels.clone()
    else:
        tensors[f"{module}.weight.absmax"] = weight.scales
    text = json.dumps(state).encode()
    tensors[f"{module}.weight.{STATE}{weight.kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def to_transformers_config(kind: str, *, is_double: bool, plain: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` that transformers needs to open such files.

    Args:
        plain: names of the linear layers that are not quantised.
    """
    common = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": plain}
    if kind == "int8":
        return {**common, "load_in_8bit": True, "load_in_4bit": False}
    return {
        **common, "load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": is_double, "bnb_4bit_compute_dtype": "float32",
    }  # fmt: skip


def _read_state(packed: Tensor, module: str) -> dict[str, Any]:
    """The JSON text in a tensor of bytes."""
    try:
        return json.loads(bytes(packed.tolist()).decode())
    except (ValueError, UnicodeDecodeError) as error:
        raise FileFormatError(
            f"{module}: its quant_state is no JSON text ({error}). Fetch the model again."
        ) from error


def _check_state(state: Mapping[str, Any], kind: str, levels: Tensor, module: str) -> None:
    """Refuses levels and sizes that this reader would expand wrongly."""
    problems = [f"{key} is missing" for key in ("blocksize", "shape") if not state.get(key)]
    expected = torch.tensor(LEVELS[kind])
    if levels.shape != expected.shape or not torch.allclose(levels.cpu(), expected, atol=1e-4):
        problems.append(f"its levels are not those of {kind}")
    if state.get("nested_blocksize", SCALES_PER_BLOCK) != SCALES_PER_BLOCK:
        problems.append(f"its scales lie in blocks of {state['nested_blocksize']}, not 256")
    if not problems and torch.Size(state["shape"]).numel() % state["blocksize"]:
        problems.append(f"blocks of {state['blocksize']} do not divide its shape {state['shape']}")
    if problems:
        raise FileFormatError(
            f"{module}: {'; '.join(problems)}. Needed is a checkpoint that bitsandbytes wrote; "
            "load the full-precision model and quantise it here."
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
