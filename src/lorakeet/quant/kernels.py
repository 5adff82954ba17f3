"""The fast paths of quantised weights, each equal to its readable reference.

| | few rows of x (decoding) | many rows (prompts, training) |
|---|---|---|
| NF4, FP4 | y = x W' while the codes are read, W never written | W into a scratch, then a matmul |
| INT8 | the same with integer codes | the same |

Decoding reads every weight once a token, so its time is the time to read W: 0.5 or 1 byte
a weight instead of 4.  Compiled code does it where llvmlite and AVX2 are
(:mod:`lorakeet.quant.compiled`); elsewhere, and for shapes that it does not cover, the
references answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakeet.base.errors import ShapeError
from lorakeet.base.native_code import find_native_code
from lorakeet.quant.int8 import Int8Weight, dequantize_int8
from lorakeet.quant.nf4 import LEVELS, Nf4Blocks, dequantize_blocks
from lorakeet.quant.scales import SCALES_PER_BLOCK, QuantizedScales

MAX_FUSED_ROWS = 16  # from here on, writing W once and one matmul are faster
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
    places = _place_nf4(blocks)
    if places is None:
        return dequantize_blocks(blocks, dtype=dtype, out=out)
    num = 2 * blocks.codes.numel()
    if out is None:
        out = torch.empty(num, dtype=dtype or blocks.dtype)
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


def multiply_nf4(x: Tensor, blocks: Nf4Blocks, *, scratch: Tensor | None = None) -> Tensor:
    """y = x W', computed in float32, for a matrix W in 4 bits.  Keeps no graph.

    Args:
        x: float [..., in].
        scratch: float32, at least out x in; W is written there when x has many rows.

    Returns:
        [..., out], in the dtype of x.

    Raises:
        ShapeError: x and W do not fit.

    Guarantees:
        Up to ``MAX_FUSED_ROWS`` rows, a row's answer depends on no other row, in any bit.

    Cost: reads 0.5 to 0.6 bytes a weight for 8 rows; beyond ``MAX_FUSED_ROWS`` writes W.
    """
    num_rows = _count_rows(x, blocks.shape)
    places = _place_nf4(blocks) if num_rows else None
    if places is None:
        W = dequantize_nf4(blocks, dtype=torch.float32, out=scratch)
        return F.linear(x.detach().float(), W).to(x.dtype)
    is_double = isinstance(blocks.scales, QuantizedScales)
    numbers = (*places, blocks.shape[1], blocks.shape[0], _bits_of(blocks))
    return _multiply(x, num_rows, numbers, (False, is_double))


def multiply_int8(x: Tensor, weight: Int8Weight, *, scratch: Tensor | None = None) -> Tensor:
    """y = x W', computed in float32, for a matrix W in 8 bits.  Keeps no graph.

    Args:
        x: float [..., in].
        scratch: float32, at least out x in; W is written there when x has many rows.

    Returns:
        [..., out], in the dtype of x.

    Raises:
        ShapeError: x and W do not fit.

    Guarantees:
        Up to ``MAX_FUSED_ROWS`` rows, a row's answer depends on no other row, in any bit.
    """
    num_rows = _count_rows(x, weight.shape)
    places = _place(weight.codes, weight.scales) if num_rows else None
    if places is None:
        W = dequantize_int8(weight, dtype=torch.float32, out=scratch)
        return F.linear(x.detach().float(), W).to(x.dtype)
    numbers = (*places, 0, 0, 0, 0, weight.shape[1], weight.shape[0], 0)
    return _multiply(x, num_rows, numbers, (True, False))


def _multiply(
    x: Tensor, num_rows: int, numbers: tuple[int, ...], form: tuple[bool, bool]
) -> Tensor:
    """y, a group of rows after the other; ``numbers`` are what a kernel takes after x and y."""
    *_, num_in, num_out, _ = numbers
    rows = x.detach().float().contiguous()  # lives until the kernel has read it
    y = torch.empty(*x.shape[:-1], num_out)
    x_place, y_place = rows.data_ptr(), y.data_ptr()
    for start in range(0, num_rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, num_rows - start)
        kernel = _load_kernel(count, *form)
        place = (x_place + 4 * start * num_in, y_place + 4 * start * num_out)
        kernel(place + numbers, count * num_in * num_out)
    return y.to(x.dtype)


def _count_rows(x: Tensor, shape: tuple[int, ...]) -> int:
    """Rows of an x that fits the weight; 0 where no kernel multiplies it as it is."""
    if len(shape) != 2 or x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ShapeError(
            f"x is {list(x.shape)} and the weight {list(shape)}; needed are x [..., in] and a "
            "weight [out, in]. Pass the input of the layer that the weight was taken from."
        )
    num_rows = x.numel() // shape[1]
    is_few = x.is_cpu and num_rows <= MAX_FUSED_ROWS and shape[1] % STEP == 0
    return num_rows if is_few else 0


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
def _load_kernel(*form: int | bool) -> Callable[[Sequence[int], int], None]:
    """The import waits until native code is known to be here."""
    from lorakeet.quant.compiled import load_kernel

    return load_kernel(*form)
