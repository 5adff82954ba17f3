"""A frozen linear layer whose weight is held in 4 or 8 bits.

Forward                                   saved: nothing but the layer itself
    W = expand(codes, scales)             into a scratch that all layers share; not for few rows
    y = x W^T + b

Backward, with dy given and the weight frozen
    W = expand(codes, scales)             again, instead of keeping it
    dx = dy W                             exact: W is the matrix that the forward used

Cost: the codes and scales, and one scratch of the largest layer for the whole model; two
expansions a step and layer, which a few hundred tokens pay back.

The weight is always held as [out, in], whichever way round the layer before it did.

Source: arXiv:2305.14314, section 3, equations 5 and 6.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakeet.quant.int8 import Int8Weight, multiply_rounded
from lorakeet.quant.kernels import (
    dequantize_nf4,
    dequantize_rows,
    is_few,
    multiply,
)
from lorakeet.quant.nf4 import Nf4Blocks
from lorakeet.quant.scales import QuantizedScales

Quantized = Nf4Blocks | Int8Weight
SLACK = 64  # numbers; aligned to 64 bytes, an array needs a hole of 96 bytes more than its own
_DOUBLE = ("codes", "scales", "offset", "levels")


def new_brief(x: Tensor, *sizes: int, slack: int = SLACK) -> Tensor:
    """An empty array for numbers that are soon let go, in the dtype and place of x; no view.

    On a CPU it is larger by ``slack`` numbers, so that an array of the same sizes that is kept
    fits into the hole that it leaves.  The C library (glibc before 2.38) fits no aligned array
    into the hole of an equal one, and each layer of a model would leave one more.
    """
    if x.is_cuda:
        return x.new_empty(sizes)
    return x.new_empty(math.prod(sizes) + slack).resize_(sizes)


class Scratch(threading.local):
    """Memory for one expanded weight, shared by all layers of a model; each thread has its own."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, num: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """At least ``num`` elements, which the next call overwrites."""
        kept = self.held.get((dtype, device))
        if kept is None or kept.numel() < num:
            self.held.pop((dtype, device), None)  # frees the small one before the large one is made
            kept = self.held[dtype, device] = torch.empty(num, dtype=dtype, device=device)
        return kept

    def __deepcopy__(self, memo: dict) -> Scratch:
        return self


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W in 4 or 8 bits; its buffers are what a state_dict holds.

    Args:
        weight: [out, in]; its dtype is that of ``weight`` read as a tensor.
        bias: [out] or None; kept as it is, frozen.
        scratch: shared with other layers; None makes an own one.
        was_conv1d: whether it stands for GPT-2's Conv1D, whose weight is [in, out].

    ``rounds_inputs`` (int8 only, for inference) rounds x to 8 bits as well, row by row.
    """

    def __init__(
        self,
        weight: Quantized,
        bias: Tensor | None = None,
        *,
        scratch: Scratch | None = None,
        was_conv1d: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind = "int8" if isinstance(weight, Int8Weight) else weight.kind
        self.block_size = 0 if isinstance(weight, Int8Weight) else weight.block_size
        self.dtype = weight.dtype
        self.was_conv1d = was_conv1d
        self.scratch = scratch or Scratch()
        self.rounds_inputs = False
        self.register_buffer("codes", weight.codes)
        if isinstance(weight.scales, QuantizedScales):
            for name in _DOUBLE:
                self.register_buffer(f"scale_{name}", getattr(weight.scales, name))
        else:
            self.register_buffer("scales", weight.scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def quantized(self) -> Quantized:
        """The codes and scales as they stand."""
        if self.kind == "int8":
            return Int8Weight(codes=self.codes, scales=self.scales, dtype=self.dtype)
        scales = (
            self.scales
            if not self.is_double
            else QuantizedScales(**{name: getattr(self, f"scale_{name}") for name in _DOUBLE})
        )
        return Nf4Blocks(
            codes=self.codes, scales=scales,
            block_size=self.block_size, shape=(self.out_features, self.in_features),
            dtype=self.dtype, kind=self.kind,
        )  # fmt: skip

    @property
    def is_double(self) -> bool:
        """Whether the scales are in 8 bits too."""
        return "scale_codes" in self._buffers

    @property
    def weight(self) -> Tensor:
        """W as a new tensor, float [out, in]; costs an expansion."""
        return expand(self.quantized, self.dtype)

    @property
    def num_weights(self) -> int:
        """Elements of W."""
        return self.in_features * self.out_features

    @property
    def held_bytes(self) -> int:
        """What codes and scales take; the table of 8-bit levels is shared and not counted."""
        held = [each for name, each in self.named_buffers() if name != "scale_levels"]
        return sum(each.numel() * each.element_size() for each in held)

    def expand_shared(self, dtype: torch.dtype) -> Tensor:
        """W in the scratch; the next expansion of any layer overwrites it."""
        scratch = self.scratch.take(self.num_weights, dtype, self.codes.device)
        return expand(self.quantized, dtype, out=scratch)

    def multiply(self, x: Tensor) -> Tensor:
        """The product x W^T + b without a graph; few rows read the codes, many expand them first.

        Returns:
            [..., out], no view of another tensor, as models add to it in place.
        """
        weight, bias = self.quantized, None if self.bias is None else self.bias.to(x.dtype)
        is_rounded = self.rounds_inputs and isinstance(weight, Int8Weight)
        if is_rounded or is_few(x, weight):
            y = multiply_rounded(x, weight) if is_rounded else multiply(x, weight)
            return y if bias is None else y.add_(bias)
        y = new_brief(x, *x.shape[:-1], self.out_features)
        x_TI, y_TO = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
        W_IO = self.expand_shared(x.dtype).T
        torch.mm(x_TI, W_IO, out=y_TO) if bias is None else torch.addmm(bias, x_TI, W_IO, out=y_TO)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """The product x W^T + b, in the dtype of x."""
        if torch.is_grad_enabled():
            return _Product.apply(x, self.bias, self)
        return self.multiply(x)  # in decoding a node of the graph costs as much as a small product

    def extra_repr(self) -> str:
        """Sizes and kind, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves to a device; the scales keep float32, as another dtype would change W."""
        bias = self.bias

        def move(tensor: Tensor) -> Tensor:
            if tensor is bias:
                return fn(tensor)
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

        super()._apply(move, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def expand(weight: Quantized, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """W in a dtype, in the head of ``out`` (of that dtype) or in a new tensor."""
    if isinstance(weight, Int8Weight):
        return dequantize_rows(weight, dtype=dtype, out=out)
    return dequantize_nf4(weight, dtype=dtype, out=out)


class _Product(torch.autograd.Function):
    """The product with a frozen weight; ``apply(x, b, layer)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.bias_dtype = layer, None if b is None else b.dtype
        return layer.multiply(x)  # with layer.bias, which is b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.layer.expand_shared(dy.dtype)
        if ctx.needs_input_grad[1]:  # an adapter may bring a trained bias
            db = dy.reshape(-1, dy.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
        return dx, db, None
