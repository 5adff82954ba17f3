"""A gated feed-forward part with LoRA on its three products, as one function.

Forward, with P(x) = x W0^T + b + s (x A^T) B^T for each of gate, up and down:

    g = P_gate(x),   u = P_up(x),   h = act(g) u,   y = P_down(h)

Kept for backward: x (or what a norm made it of), g, u and x A^T, h A^T; h, the widest after
them, is formed again from g and u, which backward reads anyway.

Backward, from dy:

    dh = dy W_down + dz_down A_down            dz = s dy B for each product
    dg = dh u act'(g),   du = dh act(g)
    dx = dg W_gate + du W_up + [dz_gate dz_up] [A_gate; A_up]

The sum dx grows in one buffer, and products that read x are one, with A stacked.

Legend: T tokens, r rank, I hidden, F width of the part; A [r, in], B [out, r].
Source: arXiv:2106.09685 section 4.1 and arXiv:2002.05202; the gradients are those of autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakeet.adapters.fused import keep_input, multiply, multiply_back, sum_inputs
from lorakeet.adapters.linear import LoraLinear, Plain
from lorakeet.models.units import gate, gate_back

PARTS = ("gate_proj", "up_proj", "down_proj")


def is_adapted(module: nn.Module) -> bool:
    """Whether all three products of a feed-forward part carry LoRA."""
    return all(isinstance(getattr(module, part), LoraLinear) for part in PARTS)


def run_adapted(module: nn.Module, act: str, x: Tensor) -> Tensor | None:
    """The part's answer by the function; None where a product is more than LoRA at present."""
    parts = [getattr(module, name).plain_part(x) for name in PARTS]
    if any(part is None or part.A.dtype != x.dtype for part in parts):
        return None  # 16-bit numbers beside float32 factors are left to one product at a time
    factors = [factor for part in parts for factor in (part.A, part.B)]
    return AdaptedMlp.apply(x, tuple(parts), act, *factors)


class AdaptedMlp(torch.autograd.Function):
    """The part; ``apply(x, (gate, up, down), act, A_gate, B_gate, A_up, B_up, A_down, B_down)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: tuple[Plain, Plain, Plain], act: str, *factors: Tensor
    ) -> Tensor:
        first, second, last = parts
        x_TI = x.reshape(-1, x.shape[-1])
        z_Tr = x_TI @ torch.cat([first.A, second.A]).T
        z_gate_Tr, z_up_Tr = z_Tr.split([len(first.A), len(second.A)], dim=1)
        g, u = multiply(x, first.base, first.b), multiply(x, second.base, second.b)
        g.view(-1, g.shape[-1]).addmm_(z_gate_Tr, first.B.T, alpha=first.s)
        u.view(-1, u.shape[-1]).addmm_(z_up_Tr, second.B.T, alpha=second.s)
        h = gate(g, u, act)
        y = multiply(h, last.base, last.b)
        z_down_Tr = h.view(-1, h.shape[-1]) @ last.A.T
        y.view(-1, y.shape[-1]).addmm_(z_down_Tr, last.B.T, alpha=last.s)
        ctx.save_for_backward(*keep_input(x), g, u, z_Tr, z_down_Tr, *factors)
        ctx.parts, ctx.act = parts, act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, r_T1, w, g, u, z_Tr, z_down_Tr, A1, B1, A2, B2, A3, B3 = ctx.saved_tensors
        first, second, last = ctx.parts
        dy_TI = dy.reshape(-1, dy.shape[-1])
        dz_down_Tr = (dy_TI @ B3).mul_(last.s)
        dh_TF = multiply_back(dy_TI, last.base).addmm_(dz_down_Tr, A3)
        dg_TF, du_TF, h_TF = gate_back(dh_TF, g.view(dh_TF.shape), u.view(dh_TF.shape), ctx.act)
        dA3, dB3 = dz_down_Tr.T @ h_TF, (dy_TI.T @ z_down_Tr).mul_(last.s)
        dz_Tr = torch.cat([(dg_TF @ B1).mul_(first.s), (du_TF @ B2).mul_(second.s)], dim=1)
        r = len(A1)
        dA1, dA2 = sum_inputs(dz_Tr, x, r_T1, w, x.dtype).split([r, len(A2)])
        dB1 = (dg_TF.T @ z_Tr[:, :r]).mul_(first.s)
        dB2 = (du_TF.T @ z_Tr[:, r:]).mul_(second.s)
        dx = None
        if ctx.needs_input_grad[0]:
            dx_TI = multiply_back(du_TF, second.base, multiply_back(dg_TF, first.base))
            dx = dx_TI.addmm_(dz_Tr, torch.cat([A1, A2])).view(x.shape)
        return dx, None, None, dA1, dB1, dA2, dB2, dA3, dB3
