"""The kernels of quantised weights for a GPU, in Triton; twins of those for the CPU.

Each is a grid of programs.  ``expand`` gives every program a run of codes; the products give
every program some outputs, whose codes it reads once for up to ``ROWS`` rows of x.  Levels are
loaded from a table of 16 floats that stays in the first cache.  Rows are always padded to
``ROWS``, so that a row's answer does not depend on how many stand beside it.

More rows are better served by an expansion and the matmul of the tensor cores.

Cost: a product reads 0.5 or 1 byte a weight, and x once for each ``OUTS`` outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakeet.quant.int8 import Int8Weight
from lorakeet.quant.nf4 import LEVELS, Nf4Blocks

ROWS = 8  # of x that a program multiplies at once
OUTS, COLUMNS = 8, 64  # outputs of a program, and bytes of codes a turn
EXPANDED_BYTES = 1024  # of codes that a program expands


@triton.jit
def expand_kernel(
    codes, scales, levels, out, num_bytes, block_bits: tl.constexpr, size: tl.constexpr
):
    """The levels of codes times their scales: out[i] = levels[codes[i]] * scales[i / K]."""
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    is_inside = at < num_bytes
    code = tl.load(codes + at, mask=is_inside, other=0).to(tl.int32)
    scale = tl.load(scales + (at >> (block_bits - 1)), mask=is_inside, other=0.0)
    earlier = tl.load(levels + (code >> 4)) * scale
    later = tl.load(levels + (code & 15)) * scale
    weights = tl.interleave(earlier, later)
    first = tl.program_id(0).to(tl.int64) * size * 2
    place = first + tl.arange(0, 2 * size)
    tl.store(out + place, weights.to(out.dtype.element_ty), mask=place < 2 * num_bytes)


@triton.jit
def nf4_kernel(
    x, codes, scales, levels, y, num_rows, num_in, num_out,
    block_bits: tl.constexpr, rows: tl.constexpr, outs: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """y[m, o] = sum_k x[m, k] levels[codes[o, k]] * scale, for ``outs`` outputs."""
    m = tl.arange(0, rows)
    o = tl.program_id(0) * outs + tl.arange(0, outs)
    half = num_in // 2
    total = tl.zeros((rows, outs), dtype=tl.float32)
    for start in range(0, half, columns):
        j = start + tl.arange(0, columns)
        is_weight = (o[:, None] < num_out) & (j[None, :] < half)
        place = o[:, None].to(tl.int64) * half + j[None, :]
        code = tl.load(codes + place, mask=is_weight, other=0).to(tl.int32)
        scale = tl.load(scales + (place >> (block_bits - 1)), mask=is_weight, other=0.0)
        earlier = tl.load(levels + (code >> 4)) * scale
        later = tl.load(levels + (code & 15)) * scale
        is_input = (m[:, None] < num_rows) & (j[None, :] < half)
        pair = x + m[:, None] * num_in + 2 * j[None, :]
        x_earlier = tl.load(pair, mask=is_input, other=0.0).to(tl.float32)
        x_later = tl.load(pair + 1, mask=is_input, other=0.0).to(tl.float32)
        products = x_earlier[:, None, :] * earlier[None, :, :]
        products += x_later[:, None, :] * later[None, :, :]
        total += tl.sum(products, axis=2)
    is_output = (m[:, None] < num_rows) & (o[None, :] < num_out)
    answer = total.to(y.dtype.element_ty)
    tl.store(y + m[:, None] * num_out + o[None, :], answer, mask=is_output)


@triton.jit
def int8_kernel(
    x, codes, scales, y, num_rows, num_in, num_out,
    rows: tl.constexpr, outs: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """y[m, o] = scale[o] * sum_k x[m, k] codes[o, k], for ``outs`` outputs."""
    m = tl.arange(0, rows)
    o = tl.program_id(0) * outs + tl.arange(0, outs)
    total = tl.zeros((rows, outs), dtype=tl.float32)
    for start in range(0, num_in, columns):
        k = start + tl.arange(0, columns)
        is_weight = (o[:, None] < num_out) & (k[None, :] < num_in)
        place = o[:, None].to(tl.int64) * num_in + k[None, :]
        code = tl.load(codes + place, mask=is_weight, other=0).to(tl.float32)
        is_input = (m[:, None] < num_rows) & (k[None, :] < num_in)
        inputs = tl.load(x + m[:, None] * num_in + k[None, :], mask=is_input, other=0.0)
        total += tl.sum(inputs.to(tl.float32)[:, None, :] * code[None, :, :], axis=2)
    scale = tl.load(scales + o, mask=o < num_out, other=0.0)
    is_output = (m[:, None] < num_rows) & (o[None, :] < num_out)
    answer = (total * scale[None, :]).to(y.dtype.element_ty)
    tl.store(y + m[:, None] * num_out + o[None, :], answer, mask=is_output)


def expand_nf4(blocks: Nf4Blocks, out: Tensor) -> Tensor:
    """``dequantize_blocks`` into the head of ``out``, in its dtype.

    Args:
        blocks: on the device of ``out``; the block size is a power of two.
        out: contiguous, at least N elements.

    Returns:
        [*shape], the head of ``out``.

    Guarantees:
        Equal to the reference in every bit.
    """
    num_bytes = blocks.codes.numel()
    flat = out.view(-1)[: 2 * num_bytes]
    expand_kernel[(triton.cdiv(num_bytes, EXPANDED_BYTES),)](
        blocks.codes, blocks.read_scales(), _levels(blocks), flat, num_bytes,
        block_bits=blocks.block_size.bit_length() - 1, size=EXPANDED_BYTES,
    )  # fmt: skip
    return flat.view(blocks.shape)


def multiply_nf4(x: Tensor, blocks: Nf4Blocks) -> Tensor:
    """y = x W' for up to ``ROWS`` rows, computed in float32.

    Args:
        x: float [..., in], in even.

    Returns:
        [..., out], in the dtype of x.

    Guarantees:
        A row's answer depends on no other row, in any bit.
    """
    num_out, num_in = blocks.shape
    x, y = x.detach().contiguous(), x.new_empty(*x.shape[:-1], num_out)
    nf4_kernel[(triton.cdiv(num_out, OUTS),)](
        x, blocks.codes, blocks.read_scales(), _levels(blocks), y,
        x.numel() // num_in, num_in, num_out, block_bits=blocks.block_size.bit_length() - 1,
        rows=ROWS, outs=OUTS, columns=COLUMNS,
    )  # fmt: skip
    return y


def multiply_int8(x: Tensor, weight: Int8Weight) -> Tensor:
    """y = x W' for up to ``ROWS`` rows, computed in float32.

    Args:
        x: float [..., in].

    Returns:
        [..., out], in the dtype of x.

    Guarantees:
        A row's answer depends on no other row, in any bit.
    """
    num_out, num_in = weight.shape
    x, y = x.detach().contiguous(), x.new_empty(*x.shape[:-1], num_out)
    int8_kernel[(triton.cdiv(num_out, OUTS),)](
        x, weight.codes, weight.scales, y, x.numel() // num_in, num_in, num_out,
        rows=ROWS, outs=OUTS, columns=COLUMNS,
    )  # fmt: skip
    return y


def _levels(blocks: Nf4Blocks) -> Tensor:
    """The 16 levels on the device of the codes."""
    return torch.tensor(LEVELS[blocks.kind], device=blocks.codes.device)
