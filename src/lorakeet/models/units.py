"""Elementwise parts of a layer as functions that save little and recompute the rest.

    RMS norm    y = w x / sqrt(mean(x^2) + eps)             saves x and one number a row,
                                                            as do the adapted products of y
    gate        y = act(g) u                                saves g and u, not act(g)
    rotation    (x1, x2) -> (x1 c - x2 s, x2 c + x1 s)      saves nothing but c and s
    dropout     y = m x / q,  m = 1 with probability q      saves m, a byte a number

Plain autograd keeps three to five arrays of the size of x for each of these; on a
CPU, writing and reading them costs more than the arithmetic.  On a GPU the kernels of
``units_gpu`` compute the same in one pass each.

Legend: ... any leading sizes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakeet.adapters.fused import remember_norm
from lorakeet.models.kernels import load_units
from lorakeet.quant.linear import SLACK, new_brief


class RmsNorm(torch.autograd.Function):
    """w x r with r = 1 / sqrt(mean(x^2) + eps); ``apply(x, w, eps)`` (arXiv:1910.07467).

    With n = x r and t = dy w:   dx = r (t - n mean(t n)),   dw = sum dy n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        if gpu := load_units(x):
            y, r = gpu.norm(x, w, eps)
            ctx.save_for_backward(x, w, r)
            remember_norm(y, x, r, w)
            return y
        wide = torch.promote_types(x.dtype, torch.float32)
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, r)
        y = torch.mul(x, r, out=new_brief(r, *x.shape)).mul_(w).to(x.dtype)
        remember_norm(y, x, r, w)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, r = ctx.saved_tensors
        if gpu := load_units(x):
            return *gpu.norm_backward(x, w, r, dy, wants_dw=ctx.needs_input_grad[1]), None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy * (x * r)).reshape(-1, x.shape[-1]).sum(0)
        dtype, x = x.dtype, x.to(r.dtype)
        t = dy.to(r.dtype) * w
        mean = torch.linalg.vecdot(t, x).unsqueeze_(-1).div_(x.shape[-1]).mul_(r.square())
        return t.addcmul_(x, mean, value=-1).mul_(r).to(dtype), dw, None


_ACT: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (torch.ops.aten.silu, torch.ops.aten.silu_backward),
    "gelu": (torch.ops.aten.gelu, torch.ops.aten.gelu_backward),
    "gelu-tanh": (
        partial(torch.ops.aten.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}
ACTIVATIONS = tuple(_ACT)


class Gate(torch.autograd.Function):
    """act(g) u; ``apply(g, u, act)`` with act one of ``ACTIVATIONS`` (arXiv:2002.05202)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.act = act
        return gate(g, u, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        g, u = ctx.saved_tensors
        if gpu := load_units(g):
            return *gpu.gate_backward(g, u, dy, ctx.act), None
        forward, backward = _ACT[ctx.act]
        return backward(dy * u, g), forward(g).mul_(dy), None


def gate(g: Tensor, u: Tensor, act: str) -> Tensor:
    """h = act(g) u."""
    if gpu := load_units(g):
        return gpu.gate(g, u, act)
    h = new_brief(g, *g.shape, slack=2 * SLACK)  # its hole serves the next layer's g
    return _ACT[act][0](g, out=h).mul_(u)


def gate_back(dh: Tensor, g: Tensor, u: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dg, du, h) with dg = dh u act'(g), du = dh act(g); dh is overwritten."""
    if gpu := load_units(g):
        return *gpu.gate_backward(g, u, dh, act), gpu.gate(g, u, act)
    forward, backward = _ACT[act]
    du = forward(g)
    h = du * u
    du.mul_(dh)
    return backward(dh.mul_(u), g), du, h


class Rotate(torch.autograd.Function):
    """Rotary positions; ``apply(x, cos, sin)`` with x [..., T, D] (arXiv:2104.09864).

    The two halves of D are the two coordinates; turning back is the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if x.ndim == 4 and (gpu := load_units(x)):
            return gpu.rotate(x, cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if dy.ndim == 4 and (gpu := load_units(dy)):
            return gpu.rotate(dy, cos, sin, is_backward=True), None, None
        return _turn(dy, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first cos.shape[-1] coordinates turned, the others as they are."""
    width = cos.shape[-1]
    half = width // 2
    if width == x.shape[-1]:
        y = x * cos
    else:
        y = x.clone()
        y[..., :width] *= cos
    y[..., :half].addcmul_(x[..., half:width], sin[..., :half], value=-1)
    y[..., half:width].addcmul_(x[..., :half], sin[..., half:])
    return y


class Dropout(torch.autograd.Function):
    """m x / q with m = 1 at a probability q, else 0; ``apply(x, p)`` with q = 1 - p.

    torch draws a float for each number on a CPU, one after the other; here 64 random bits
    give four numbers of 16 bits, of which those below 65,536 p drop.  So p is a multiple of
    1 / 65,536, off by less than 1e-5, and q is what it then is: the mean of y is x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        limit = min(65_535, max(1, round(65_536 * p)))
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        m = (bits.view(torch.int16)[: x.numel()] >= limit - 32_768).view(x.shape)
        ctx.save_for_backward(m)
        ctx.gain = 65_536 / (65_536 - limit)
        return (x * m).mul_(ctx.gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (m,) = ctx.saved_tensors
        return (dy * m).mul_(ctx.gain), None


def draws_fast(x: Tensor) -> bool:
    """Whether ``Dropout`` draws for a tensor: on a CPU, where torch's own drawing is slow."""
    return x.device.type == "cpu"
