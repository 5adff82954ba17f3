"""INT8: each output channel of a weight has one scale, symmetric around zero.

    code = round(127 w / s_o)        w ~ code * s_o / 127,        s_o = max |w| of row o

The activations keep their dtype, or each row of them is rounded the same way while it comes
(dynamic, so no calibration is needed), and the products are sums of integers:

    y_to = s_t s_o / 127^2 * sum_k codes_tk codes_ok              s_t = max |x| of row t

No outliers are split off: large models have columns of x that need the full dtype.  The
rounding is that of bitsandbytes' row-wise quantisation.

Cost: 1 byte a weight and 4 bytes a row.
Source: arXiv:2208.07339, section 2.1 (absmax quantisation), vector-wise over the rows, and
equation 5 (vector-wise products).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.base.errors import NumericsError, ShapeError

EXACT_COLUMNS = 1024  # 1024 * 127^2 < 2^24: so many products add up in float32 without rounding


@dataclass(frozen=True, kw_only=True)
class Int8Weight:
    """A matrix in 8 bits.

    Args:
        codes: int8 [out, in], from -127 to 127.
        scales: float32 [out]; w ~ codes * scales.
        dtype: of the weight before.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return tuple(self.codes.shape)


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Rounds a matrix to 8 bits, row by row.

    Args:
        weight: float [out, in]; read, never changed.

    Raises:
        ShapeError: it is no matrix.
        NumericsError: it holds NaN or infinity.

    Guarantees:
        |weight - dequantize_int8(result)| <= s_o / 254, up to float32; zeros come back exact.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise ShapeError(
            f"a weight of shape {tuple(weight.shape)} is no matrix, and INT8 has one scale for "
            "each of its rows. Leave this layer out."
        )
    if not torch.isfinite(weight).all():
        raise NumericsError(
            f"a weight of {' x '.join(map(str, weight.shape))} holds NaN or infinity, which would "
            "spoil a whole row. Fetch the model again, or leave this layer out."
        )
    w = weight.detach().float()
    largest = w.abs().amax(dim=1)
    factors = torch.where(largest > 0, 127.0 / largest, 0)
    codes = (w * factors[:, None]).round_().to(torch.int8)
    return Int8Weight(codes=codes, scales=largest / 127, dtype=weight.dtype)


def dequantize_int8(
    quantized: Int8Weight, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """w ~ codes * scales, computed in float32.

    Args:
        dtype: of the answer; None takes that of the weight before.
        out: contiguous, at least out x in elements; its head is overwritten and returned.

    Returns:
        [out, in].
    """
    codes, scales = quantized.codes, quantized.scales
    if out is None:
        out = torch.empty(codes.numel(), dtype=dtype or quantized.dtype, device=codes.device)
    w_OI = out.view(-1)[: codes.numel()].view(codes.shape)
    if w_OI.dtype == torch.float32:
        return torch.mul(codes, scales[:, None], out=w_OI)
    return w_OI.copy_(codes * scales[:, None])


def quantize_inputs(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds activations to 8 bits, each row with a scale of its own.

    Args:
        x_TI: float [T, in].

    Returns:
        whole numbers from -127 to 127 as float32 [T, in], and scales float32 [T, 1]; x ~
        codes * scales.  A row with NaN or infinity becomes NaN and spoils no other.
    """
    x = x_TI.float()
    largest = x.abs().amax(dim=1, keepdim=True)
    factors = torch.where(largest == 0, 0, 127.0 / largest)
    return (x * factors).round_(), largest / 127


def multiply_rounded(x: Tensor, weight: Int8Weight) -> Tensor:
    """y = x W' with both in 8 bits and exact integer sums; keeps no graph.

    On processors without instructions for 8-bit products float32 units form the same whole
    numbers fastest, so on a CPU with AVX2 this is no faster than weights in 8 bits alone.

    Args:
        x: float [..., in].

    Returns:
        [..., out], in the dtype of x.

    Guarantees:
        A row's answer depends on no other row.
    """
    num_out, num_in = weight.shape
    codes_TI, scales_T1 = quantize_inputs(x.detach().reshape(-1, num_in))
    sums_TO = codes_TI.new_zeros(len(codes_TI), num_out, dtype=torch.float64)
    for start in range(0, num_in, EXACT_COLUMNS):
        part = slice(start, start + EXACT_COLUMNS)
        sums_TO += codes_TI[:, part] @ weight.codes[:, part].float().T
    y_TO = sums_TO.float().mul_(scales_T1).mul_(weight.scales)
    return y_TO.to(x.dtype).view(*x.shape[:-1], num_out)
