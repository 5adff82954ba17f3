"""W0 x + b + s B A x as one function that saves little and makes no copy of its answer.

Forward                         saved: x, z (z is T x r)
    z = x A^T
    y = x W0^T + b,   y += s z B^T            (into y, no temporary of y's size)

Backward, with dy given and W0 frozen
    dz = s dy B
    dx = dy W0,       dx += dz A
    dA = dz^T x,      dB = s dy^T z

An x that is a norm's answer n = w (r x'), made from x' and one r a row, is not kept beside x',
which the norm keeps anyway (``Normed``); nothing of n's size is computed for it again:

    dA = dz^T n = ((r dz)^T x') w

On a GPU x, y and W0 may have 16 bits beside A and B in float32: these are rounded to x's dtype
for the products, and dA and dB, sums over all tokens, leave the matmul in float32.

Legend: T tokens, r rank; x [T, in], W0 [out, in], A [r, in], B [out, r], s = alpha / r.
Source: arXiv:2106.09685 section 4.1; the gradients are those of autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakeet.quant.linear import QuantizedLinear, new_brief

Base = Tensor | QuantizedLinear
HALVES = (torch.bfloat16, torch.float16)


class LoraProduct(torch.autograd.Function):
    """The adapted linear layer; ``apply(x, W0, b, A, B, s)`` with W0 as [out, in].

    A quantised layer in the place of W0 is expanded into its scratch, in backward again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Base, b: Tensor | None, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        ctx.dtypes = A.dtype, B.dtype
        A, B = A.to(x.dtype), B.to(x.dtype)
        x_TI = x.reshape(-1, x.shape[-1])
        y = multiply(x, base, b)
        z_Tr = x_TI @ A.T
        y.view(-1, y.shape[-1]).addmm_(z_Tr, B.T, alpha=s)
        ctx.save_for_backward(*keep_input(x), z_Tr, A, B)
        ctx.base, ctx.s = base, s  # frozen, so no gradient and no version to watch
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, r, w, z_Tr, A, B = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dz_Tr = (dy_TO @ B).mul_(ctx.s)
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            dx = multiply_back(dy_TO, ctx.base).addmm_(dz_Tr, A).view(x.shape)
        if ctx.needs_input_grad[3]:
            dA = sum_inputs(dz_Tr, x, r, w, ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            dB = sum_products(dy_TO.T, z_Tr, ctx.dtypes[1]).mul_(ctx.s)
        return dx, None, None, dA, dB, None


@dataclass(frozen=True, kw_only=True, slots=True)
class Normed:
    """What a norm's answer n = w (r x) is made of; n carries it as its attribute ``normed``.

    Args:
        version: of n when it was made; another one says that n has been changed in place.
    """

    x: Tensor
    r: Tensor
    w: Tensor
    version: int


def remember_norm(n: Tensor, x: Tensor, r: Tensor, w: Tensor) -> None:
    """Lets the products that read n keep x and r in its place, where all have one dtype."""
    if n.dtype == r.dtype == w.dtype:
        n.normed = Normed(x=x.detach(), r=r, w=w.detach(), version=n._version)


def keep_input(x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a product saves of its input: (x, None, None), or (x', r, w) of a norm's answer."""
    normed = getattr(x, "normed", None)
    if normed is None or normed.version != x._version:
        return x, None, None
    return normed.x, normed.r, normed.w


def sum_inputs(
    dz_Tr: Tensor, x: Tensor, r: Tensor | None, w: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product dz^T x, [r, in], of an input as ``keep_input`` has it."""
    if r is None or w is None:
        return sum_products(dz_Tr.T, x.reshape(-1, x.shape[-1]), dtype)
    scaled_Tr = dz_Tr * r.reshape(-1, 1)
    return sum_products(scaled_Tr.T, x.reshape(-1, x.shape[-1]), dtype).mul_(w)


def multiply(x: Tensor, base: Base, b: Tensor | None) -> Tensor:
    """The product x W0^T + b of the frozen layer alone, [..., out].

    It is no view of another tensor, as models add to it in place.
    """
    if isinstance(base, QuantizedLinear):
        return base.multiply(x)
    y = new_brief(x, *x.shape[:-1], base.shape[0])
    x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    torch.mm(x_TI, base.T, out=y_TO) if b is None else torch.addmm(b, x_TI, base.T, out=y_TO)
    return y


def multiply_back(dy_TO: Tensor, base: Base, onto: Tensor | None = None) -> Tensor:
    """The product dy W0, [T, in], added to ``onto`` where one is given."""
    W0 = base.expand_shared(dy_TO.dtype) if isinstance(base, QuantizedLinear) else base
    return dy_TO @ W0 if onto is None else onto.addmm_(dy_TO, W0)


def sum_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product a b in a dtype that may be wider than theirs, never rounded on the way."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:  # cuBLAS adds up in float32 anyway and leaves it so (torch 2.8)
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def can_fuse(x: Tensor, base: Base, b: Tensor | None, A: Tensor) -> bool:
    """Whether the fused product serves: a frozen base, and one dtype but for a GPU's 16 bits."""
    own = [b] if isinstance(base, QuantizedLinear) else [base, b]
    own = [each for each in own if each is not None]
    is_frozen = not any(each.requires_grad for each in own)
    is_one_dtype = all(each.dtype == x.dtype for each in own)
    is_mixed = x.is_cuda and x.dtype in HALVES and A.dtype == torch.float32
    is_known = is_one_dtype and (A.dtype == x.dtype or is_mixed)
    return is_frozen and is_known and not torch.is_autocast_enabled()
