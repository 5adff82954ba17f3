"""Loss through a frozen output head, block by block of the vocabulary.

For each position with target t, over blocks v of the vocabulary and with z = h W^T + b:

    m' = max(m, max z_v)                      the largest logit so far
    Z  = Z e^(m - m') + sum e^(z_v - m')
    g  = g e^(m - m') + e^(z_v - m') W_v

    loss = m + log Z - z_t,      dh = g / Z - W_t

Blocks of rows would pack the whole of W for every few rows; here each weight is read once for
all positions, in matmuls of full size, and a block stays in the caches for the elementwise
part.  In float32 at 151,936 ids that took half the time of blocks of rows.  A head in 16 bits
(``quant.narrow``) is widened block by block.

Legend: N targets, D hidden, V vocabulary, U ids of a block.
Source: the running softmax of arXiv:1805.02867 (Algorithm 3), with the gradient beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakeet.quant.narrow import NarrowHead

BLOCK_LOGITS = 4_000_000  # 16 MB, which the last cache of a server's processor holds
FEWEST_IDS = 1024  # of a block; fewer make the matmul slow


def is_frozen(hidden_ND: Tensor, head: nn.Module, soft_cap: float | None) -> bool:
    """Whether the loss is this one: float32, no cap, and a head that is not trained."""
    dtype = head.dtype if isinstance(head, NarrowHead) else head.weight.dtype
    is_plain = hidden_ND.dtype == dtype == torch.float32 and not soft_cap
    return is_plain and not any(parameter.requires_grad for parameter in head.parameters())


class FrozenHead(torch.autograd.Function):
    """The summed loss; ``apply(h, W, b, t, wants_gradient)``; dh is ready after the forward.

    Cost: one block of logits, with its weights where they are widened, and one [N, D] gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        wants_gradient: bool,
    ) -> Tensor:
        """The summed loss, float32; each weight is read once."""
        g_ND = torch.zeros_like(hidden_ND) if wants_gradient and ctx.needs_input_grad[0] else None
        m_N1 = hidden_ND.new_full((len(hidden_ND), 1), -torch.inf)
        Z_N1, z_t_N1 = torch.zeros_like(m_N1), torch.zeros_like(m_N1)
        is_narrow, (V, D) = weight_VD.dtype != hidden_ND.dtype, weight_VD.shape
        width = max(FEWEST_IDS, BLOCK_LOGITS // max(1, len(hidden_ND) + is_narrow * D))
        scratch = hidden_ND.new_empty(len(hidden_ND) * min(width, V))
        wide_UD = hidden_ND.new_empty(min(width, V), D) if is_narrow else None
        for start in range(0, V, width):
            weight_UD = weight_VD[start : start + width]
            if wide_UD is not None:
                weight_UD = wide_UD[: len(weight_UD)].copy_(weight_UD)
            z_NU = scratch[: len(hidden_ND) * len(weight_UD)].view(-1, len(weight_UD))
            if bias_V is None:
                torch.mm(hidden_ND, weight_UD.T, out=z_NU)
            else:
                torch.addmm(bias_V[start : start + width], hidden_ND, weight_UD.T, out=z_NU)
            place_N1 = targets_N[:, None] - start
            is_here_N1 = (place_N1 >= 0) & (place_N1 < len(weight_UD))
            found_N1 = z_NU.gather(1, place_N1.clamp(0, len(weight_UD) - 1))
            z_t_N1 = torch.where(is_here_N1, found_N1, z_t_N1)
            new_m_N1 = torch.maximum(m_N1, z_NU.amax(1, keepdim=True))
            shrink_N1, m_N1 = (m_N1 - new_m_N1).exp_(), new_m_N1
            e_NU = z_NU.sub_(m_N1).exp_()
            Z_N1.mul_(shrink_N1).add_(e_NU.sum(1, keepdim=True))
            if g_ND is not None:
                g_ND.mul_(shrink_N1).addmm_(e_NU, weight_UD)
        if g_ND is not None:
            g_ND.div_(Z_N1).sub_(weight_VD.index_select(0, targets_N))
        ctx.save_for_backward(g_ND)
        return (Z_N1.log_().add_(m_N1).sub_(z_t_N1)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """dh, formed before, times the loss's own gradient."""
        (g_ND,) = ctx.saved_tensors
        return g_ND * d_loss if g_ND is not None else None, None, None, None, None
