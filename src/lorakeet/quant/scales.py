"""Double quantisation: the scales of 4-bit blocks in 8 bits of their own.

A block of K = 64 weights has one float32 scale, half a bit a weight.  The scales c are
rounded a second time, in blocks of 256, after their mean has been taken off:

    c = offset + s2 * LEVELS8[code]        offset = mean(c),  s2 = max |c - offset| of a block

LEVELS8 are 256 numbers of "dynamic" type: a sign, an exponent in unary and a fraction,
dense near 0.  Cost: 8 / 64 + 32 / (64 * 256) = 0.127 bit a weight instead of 0.5.

The levels are those of bitsandbytes.  Rounding is to the nearest; bitsandbytes' CPU code
finds it with a coarser look-up, which errs at ties to within 1e-4 (0.1 to 0.5 % of the codes).

Source: arXiv:2305.14314, section 3 (double quantisation); arXiv:2110.02861, section 1.3
(dynamic tree quantisation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALES_PER_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class QuantizedScales:
    """Scales in 8 bits.

    Args:
        codes: uint8 [n].
        scales: float32 [ceil(n / 256)], s2 of each block.
        offset: float32 [], the mean of what was quantised.
        levels: float32 [256], ascending.
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor
    levels: Tensor


def build_dynamic_levels() -> Tensor:
    """LEVELS8: for each of 7 decades a binary number of fractions, both signs, 0 and 1.

    Returns:
        float32 [256], ascending, from -0.993 to 1.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels))


def quantize_scales(scales: Tensor) -> QuantizedScales:
    """Rounds scales to 8 bits, in blocks of 256 around their mean.

    Args:
        scales: float32 [n], finite; read, never changed.

    Guarantees:
        |c - c'| <= 0.0071 s2: half the largest gap of LEVELS8.
    """
    levels = build_dynamic_levels().to(scales.device)
    offset = scales.mean()
    centred = scales - offset
    largest = torch.stack([block.abs().max() for block in centred.split(SCALES_PER_BLOCK)])
    inverse = torch.where(largest > 0, 1 / largest, 0)
    spread = inverse.repeat_interleave(SCALES_PER_BLOCK)[: len(scales)]
    normed = (centred * spread).clamp_(-1, 1)
    right = torch.searchsorted(levels, normed).clamp_(1, len(levels) - 1)
    is_left = (normed - levels[right - 1]).abs() <= (levels[right] - normed).abs()
    codes = (right - is_left.to(right.dtype)).to(torch.uint8)
    return QuantizedScales(codes=codes, scales=largest, offset=offset, levels=levels)


def dequantize_scales(quantized: QuantizedScales) -> Tensor:
    """c' = offset + s2 * LEVELS8[code], float32 [n]."""
    values = quantized.levels[quantized.codes.int()]
    spread = quantized.scales.repeat_interleave(SCALES_PER_BLOCK)[: len(values)]
    return values.mul_(spread).add_(quantized.offset)
