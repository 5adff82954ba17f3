"""The fast paths of quantised weights, each equal to its readable reference.

| | few rows of x (decoding) | many rows (prompts, training) |
|---|---|---|
| NF4, FP4 | y = x W' while the codes are read, W never written | W into a scratch, then a matmul |
| INT8 | the same with integer codes | the same |

Decoding reads every weight once a token, so its time is the time to read W: 0.5 or 1 byte
a weight instead of 4.  Compiled code does it where llvmlite and AVX2 are
(:mod:`lorakeet.quant.compiled`), and Triton on a GPU (:mod:`lorakeet.quant.kernels_gpu`);
elsewhere, and for shapes that they do not cover, the references answer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakeet.base.errors import ShapeError
from lorakeet.base.native_code import find_native_code
from lorakeet.quant.int8 import Int8Weight, dequantize_int8
from lorakeet.quant.nf4 import LEVELS, Nf4Blocks, dequantize_blocks
from lorakeet.quant.scales import SCALES_PER_BLOCK, QuantizedScales

if TYPE_CHECKING:
    from lorakeet.quant.compiled import Kernel

MAX_FUSED_ROWS = 32  # beyond, writing W once and one matmul are faster
ROWS_AT_ONCE = 8  # sums of one output that fit into the registers of AVX2
STEP = 64  # weights that a kernel reads at a time
PIECE = 2**20  # weights that are float32 at once on the way to another dtype
STREAM_BYTES = 32  # what an address must be divisible by to be written past the caches


def dequantize_nf4(
    blocks: Nf4Blocks, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """w_i ~ s * LEVELS[code_i]: ``dequantize_blocks``, faster.

    Args:
        dtype: of the answer; None takes that of the weight before.
        out: contiguous, at least N elements; its head is overwritten and returned.

    Returns:
        [*shape].

    Guarantees:
        Equal to the reference in every bit, on any number of threads.
    """
    places, on_gpu = _place_nf4(blocks), _load_gpu(blocks.codes)
    if places is None and not on_gpu:
        return dequantize_blocks(blocks, dtype=dtype, out=out)
    num = 2 * blocks.codes.numel()
    if out is None:
        out = torch.empty(num, dtype=dtype or blocks.dtype, device=blocks.codes.device)
    if on_gpu:
        return on_gpu.expand_nf4(blocks, out)
    flat = out.view(-1)[:num]
    if out.dtype != torch.float32:
        for start in range(0, num, PIECE):
            flat[start : start + PIECE] = dequantize_nf4(
                _cut(blocks, start, min(num, start + PIECE)), dtype=torch.float32
            )
        return flat.view(blocks.shape)
    is_double = isinstance(blocks.scales, QuantizedScales)
    kernel = _load_kernel(0, False, is_double, flat.data_ptr() % STREAM_BYTES == 0)
    kernel((0, flat.data_ptr(), *places, num, num // STEP, _bits_of(blocks)), num)
    return flat.view(blocks.shape)


def dequantize_rows(
    weight: Int8Weight, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """w ~ codes * scales: ``dequantize_int8``, faster in float32, and equal in every bit.

    Args:
        dtype: of the answer; None takes that of the weight before.
        out: contiguous, at least out x in elements; its head is overwritten and returned.

    Returns:
        [out, in].
    """
    kind = (dtype or weight.dtype) if out is None else out.dtype
    places = _place_int8(weight) if weight.shape[1] % STEP == 0 else None
    if places is None or kind != torch.float32:
        return dequantize_int8(weight, dtype=dtype, out=out)
    num = weight.codes.numel()
    flat = torch.empty(num) if out is None else out.view(-1)[:num]
    kernel = _load_kernel(0, True, False, flat.data_ptr() % STREAM_BYTES == 0)
    kernel((0, flat.data_ptr(), *places, *weight.shape[::-1], 0), num)
    return flat.view(weight.shape)


def is_few(x: Tensor, weight: Nf4Blocks | Int8Weight) -> bool:
    """Whether a product with x reads the codes as they are, instead of expanding them first.

    Such a product is computed in float32, so an x in float64 takes the other way.
    """
    num_rows = x.numel() // max(1, weight.shape[-1])
    if x.dtype == torch.float64 or num_rows == 0 or weight.shape[-1] % STEP:
        return False
    if x.is_cpu:
        return num_rows <= MAX_FUSED_ROWS and weight.codes.is_cpu and _is_native()
    return num_rows <= ROWS_AT_ONCE and _load_gpu(weight.codes) is not None


def multiply(x: Tensor, weight: Nf4Blocks | Int8Weight) -> Tensor:
    """y = x W' for a matrix W in 4 or 8 bits; few rows are computed in float32.  Keeps no graph.

    Args:
        x: float [..., in].

    Returns:
        [..., out], in the dtype of x.

    Raises:
        ShapeError: x and W do not fit.

    Guarantees:
        Up to ``MAX_FUSED_ROWS`` rows, a row's answer depends on no other row, in any bit.

    Cost: up to 8 rows read 0.5 to 1 byte a weight; beyond ``MAX_FUSED_ROWS``, W is written.
    """
    _check_sizes(x, weight.shape)
    is_int8 = isinstance(weight, Int8Weight)
    if is_few(x, weight):
        if x.is_cuda:
            gpu = _load_gpu(weight.codes)
            return gpu.multiply_int8(x, weight) if is_int8 else gpu.multiply_nf4(x, weight)
        places = _place_int8(weight) if is_int8 else _place_nf4(weight)
        if places is not None:
            return _multiply(x, weight, places)
    expand = dequantize_rows if is_int8 else dequantize_nf4
    return F.linear(x.detach(), expand(weight, dtype=x.dtype))


def _multiply(x: Tensor, weight: Nf4Blocks | Int8Weight, places: tuple[int, ...]) -> Tensor:
    """y, a group of rows after the other; ``places`` are the addresses from the codes on."""
    num_out, num_in = weight.shape
    is_int8 = isinstance(weight, Int8Weight)
    is_double = not is_int8 and isinstance(weight.scales, QuantizedScales)
    numbers = (*places, num_in, num_out, 0 if is_int8 else _bits_of(weight))
    rows = x.detach().float().contiguous()  # lives until the kernel has read it
    y = torch.empty(*x.shape[:-1], num_out)
    num_rows = rows.numel() // num_in
    for start in range(0, num_rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, num_rows - start)
        ends = (rows.data_ptr() + 4 * start * num_in, y.data_ptr() + 4 * start * num_out)
        kernel = _load_kernel(count, is_int8, is_double)
        kernel(ends + numbers, count * num_in * num_out)
    return y.to(x.dtype)


def _check_sizes(x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses an x that does not fit the weight."""
    if len(shape) != 2 or x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ShapeError(
            f"x is {list(x.shape)} and the weight {list(shape)}; needed are x [..., in] and a "
            "weight [out, in]. Pass the input of the layer that the weight was taken from."
        )


def _place_nf4(blocks: Nf4Blocks) -> tuple[int, ...] | None:
    """Addresses of what a kernel reads of 4-bit blocks; None where it cannot read them."""
    size, scales = blocks.block_size, blocks.scales
    if size % STEP or size & (size - 1):
        return None
    levels = _level_bytes(blocks.kind)
    if isinstance(scales, QuantizedScales):
        return _place(blocks.codes, scales.codes, levels, scales.scales, scales.levels,
                      scales.offset)  # fmt: skip
    places = _place(blocks.codes, scales, levels)
    return places and (*places, 0, 0, 0)


def _place_int8(weight: Int8Weight) -> tuple[int, ...] | None:
    """Addresses of what a kernel reads of rows in 8 bits; None where it cannot read them."""
    places = _place(weight.codes, weight.scales)
    return places and (*places, 0, 0, 0, 0)


def _place(*tensors: Tensor) -> tuple[int, ...] | None:
    """Addresses, where they are all that a kernel needs to read the tensors."""
    if not _is_native():
        return None
    for one in tensors:
        if not (one.is_cpu and one.is_contiguous()):
            return None
    return tuple([one.data_ptr() for one in tensors])


def _cut(blocks: Nf4Blocks, start: int, end: int) -> Nf4Blocks:
    """Weights start to end, flat; start is a multiple of ``PIECE``, so 256 scales divide it."""
    K, scales = blocks.block_size, blocks.scales
    part = slice(start // K, end // K)
    if isinstance(scales, QuantizedScales):
        outer = slice(part.start // SCALES_PER_BLOCK, None)
        scales = replace(scales, codes=scales.codes[part], scales=scales.scales[outer])
    else:
        scales = scales[part]
    codes = blocks.codes[start // 2 : end // 2]
    return replace(blocks, codes=codes, scales=scales, shape=(end - start,))


def _bits_of(blocks: Nf4Blocks) -> int:
    """log2 of the block size."""
    return blocks.block_size.bit_length() - 1


@cache
def _level_bytes(kind: str) -> Tensor:
    """The 16 levels by bytes: uint8 [4, 16], the lowest byte of each level first."""
    return torch.tensor(LEVELS[kind]).view(torch.uint8).view(16, 4).t().contiguous()


@cache
def _is_native() -> bool:
    return find_native_code().is_usable


@cache
def _load_kernel(*form: int | bool) -> Kernel:
    """The import waits until native code is known to be here."""
    from lorakeet.quant.compiled import load_kernel

    return load_kernel(*form)


def _load_gpu(codes: Tensor) -> ModuleType | None:
    """The Triton kernels, for codes on a GPU; None elsewhere and where Triton is absent."""
    if not codes.is_cuda or not _has_triton():
        return None
    from lorakeet.quant import kernels_gpu

    return kernels_gpu


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
