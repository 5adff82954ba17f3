"""NF4 and FP4: a weight in 4 bits, each block of neighbours with a scale of its own.

Trained weights are about normal, so 16 levels that are quantiles of the normal
distribution waste no code: NF4.  FP4 has a sign, two exponent bits and a fraction bit
instead.  Each run of K neighbours is divided by its own largest magnitude s:

    code_i = argmin_j |w_i / s - LEVELS[j]|          w_i ~ s * LEVELS[code_i]

Two codes lie in a byte, the earlier weight in the high four bits.  Levels, layout and
rounding are those of bitsandbytes, so its checkpoints can be read as they are.

Cost: 4 + 32 / K bits a weight; 4 + 8 / K + 32 / (256 K) with scales in 8 bits.
Source: arXiv:2305.14314, section 3 and appendix E (the table of NF4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakeet.base.errors import NumericsError, RequestError, ShapeError
from lorakeet.quant.scales import QuantizedScales, dequantize_scales, quantize_scales

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two exponent bits, one fraction bit, in the order of the codes; 12 is the largest.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_LEVELS = tuple(sign * level / 12 for sign in (1, -1) for level in _FP4_TWELFTHS)
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
_CHUNK_CODES = 2**20  # bytes that are expanded at once; bounds what the expansion takes


@dataclass(frozen=True, kw_only=True)
class Nf4Blocks:
    """A weight of N elements in 4 bits.

    Args:
        codes: uint8 [N / 2], two a byte, the earlier element in the high four bits.
        scales: float32 [N / K] in the unit of the weight, or these in 8 bits.
        block_size: K.
        shape: of the weight; [out, in] of a linear layer.
        dtype: of the weight before.
        kind: ``nf4`` or ``fp4``.
    """

    codes: Tensor
    scales: Tensor | QuantizedScales
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "nf4"

    def read_scales(self) -> Tensor:
        """The scales as float32 [N / K], however they are held."""
        if isinstance(self.scales, QuantizedScales):
            return dequantize_scales(self.scales)
        return self.scales


def quantize_blocks(
    weight: Tensor, *, block_size: int = 64, kind: str = "nf4", double: bool = False
) -> Nf4Blocks:
    """Rounds a weight to the nearest of 16 levels, block by block.

    Args:
        weight: float [...], N elements in all; read, never changed.
        block_size: K, one of ``BLOCK_SIZES``, and a divisor of N.  The paper uses 64.
        kind: ``nf4`` or ``fp4``.
        double: whether the scales are rounded to 8 bits too.

    Raises:
        RequestError: an unknown kind or block size.
        ShapeError: K does not divide N.
        NumericsError: the weight holds NaN or infinity, which would spoil a whole block.

    Guarantees:
        NF4: |weight - dequantize_blocks(result)| <= 0.152 s; zeros come back exact.

    Cost: 8 N bytes while it runs.
    """
    _check(weight, block_size, kind)
    w_bK = weight.detach().reshape(-1, block_size).float()
    s_b = w_bK.abs().amax(dim=1)
    normed = (w_bK * (1.0 / s_b.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    levels = torch.tensor(LEVELS[kind], device=weight.device)
    order = torch.argsort(levels, stable=True)
    middles = (levels[order[:-1]] + levels[order[1:]]) / 2
    codes = torch.bucketize(normed.reshape(-1), middles, out_int32=True)
    codes = order[codes].to(torch.uint8) if kind == "fp4" else codes.to(torch.uint8)
    return Nf4Blocks(
        codes=(codes[::2] << 4) | codes[1::2],
        scales=quantize_scales(s_b) if double else s_b,
        block_size=block_size, shape=tuple(weight.shape), dtype=weight.dtype, kind=kind,
    )  # fmt: skip


def dequantize_blocks(
    blocks: Nf4Blocks, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """w_i ~ s * LEVELS[code_i], computed in float32.

    Args:
        dtype: of the answer; None takes that of the weight before.
        out: contiguous, at least N elements; its head is overwritten and returned in the
            weight's shape.  Its dtype is the answer's.

    Returns:
        [*shape].

    Cost: beside the answer 2 to 16 MB, whatever N.
    """
    num = 2 * blocks.codes.numel()
    if out is None:
        out = torch.empty(num, dtype=dtype or blocks.dtype, device=blocks.codes.device)
    flat = out.view(-1)[:num]
    levels = torch.tensor(LEVELS[blocks.kind], device=flat.device)
    pairs = torch.stack(torch.meshgrid(levels, levels, indexing="ij"), dim=-1).view(256, 2)
    scales, K = blocks.read_scales(), blocks.block_size
    chunk = max(_CHUNK_CODES, K // 2)
    for start in range(0, num // 2, chunk):
        codes = blocks.codes[start : start + chunk]
        first = 2 * start // K
        w_bK = pairs[codes.int()].view(-1, K)
        w_bK *= scales[first : first + len(w_bK), None]
        flat[2 * start : 2 * (start + len(codes))] = w_bK.view(-1)
    return flat.view(blocks.shape)


def with_double_scales(blocks: Nf4Blocks) -> Nf4Blocks:
    """The same blocks with their scales in 8 bits."""
    if isinstance(blocks.scales, QuantizedScales):
        return blocks
    return replace(blocks, scales=quantize_scales(blocks.scales))


def _check(weight: Tensor, block_size: int, kind: str) -> None:
    """Refuses what cannot be quantised."""
    if kind not in LEVELS:
        raise RequestError(f"kind is '{kind}'; known are {', '.join(LEVELS)}.")
    if block_size not in BLOCK_SIZES:
        raise RequestError(
            f"block_size is {block_size}; known are {', '.join(map(str, BLOCK_SIZES))}."
        )
    if weight.numel() == 0 or weight.numel() % block_size:
        raise ShapeError(
            f"a weight of {' x '.join(map(str, weight.shape))} has {weight.numel()} elements, "
            f"which blocks of {block_size} do not divide. Choose a smaller block_size, or leave "
            "this layer out."
        )
    if not torch.isfinite(weight).all():
        raise NumericsError(
            f"a weight of {' x '.join(map(str, weight.shape))} holds NaN or infinity, which would "
            "spoil a whole block. Fetch the model again, or leave this layer out."
        )
