"""The loss of a chunk of logits for a GPU, in Triton; the twin of ``score.cross_entropy``.

    z = c tanh(l / c)  (or l)        loss = log sum_j e^z_j - z_t
    dl = (e^(z - lse) - [j = t]) (1 - (z / c)^2)

A program takes a row and walks over the vocabulary twice: once for the log-sum-exp, with a
running maximum (arXiv:1805.02867), and once to write the gradient over the logits.  Numbers
are float32 while they are computed, whatever the logits are held in.

Cost: each logit is read twice and written once; nothing but one loss a row is allocated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program holds at once


@triton.jit
def bend(z, soft_cap, is_capped: tl.constexpr):
    """The soft cap of logits, c tanh(z / c)."""
    if is_capped:
        z = soft_cap * (2 * tl.sigmoid(2 * z / soft_cap) - 1)
    return z


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, size, soft_cap,
    is_capped: tl.constexpr, wants_gradient: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row's loss; its logits become their gradient when that is wanted."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    target = tl.load(targets + row)
    z_t = bend(tl.load(logits + target).to(tl.float32), soft_cap, is_capped)
    j = tl.arange(0, block)
    largest = z_t
    total = 0.0
    for start in range(0, size, block):
        is_inside = start + j < size
        z = tl.load(logits + start + j, mask=is_inside, other=0.0).to(tl.float32)
        z = tl.where(is_inside, bend(z, soft_cap, is_capped), -float("inf"))
        highest = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - highest) + tl.sum(tl.exp(z - highest), axis=0)
        largest = highest
    lse = largest + tl.log(total)
    tl.store(losses + row, lse - z_t)
    if wants_gradient:
        tl.debug_barrier()
        for start in range(0, size, block):
            is_inside = start + j < size
            z = tl.load(logits + start + j, mask=is_inside, other=0.0).to(tl.float32)
            z = bend(z, soft_cap, is_capped)
            slope = tl.exp(z - lse) - tl.where(start + j == target, 1.0, 0.0)
            if is_capped:
                slope *= 1 - (z / soft_cap) * (z / soft_cap)
            tl.store(logits + start + j, slope.to(logits.dtype.element_ty), mask=is_inside)


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, soft_cap: float | None, *, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses of the rows, float32 [N], and their gradient to the logits when it is wanted.

    Args:
        logits_NV: contiguous, in 16 or 32 bits; with ``wants_gradient`` overwritten by the
            gradient, which is returned.
        targets_N: int64.
    """
    losses_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    size = logits_NV.shape[1]
    block = min(BLOCK, triton.next_power_of_2(size))
    cross_entropy_kernel[(len(logits_NV),)](
        logits_NV, targets_N.contiguous(), losses_N, size, soft_cap or 1.0,
        is_capped=bool(soft_cap), wants_gradient=wants_gradient, block=block,
        num_warps=8 if block == BLOCK else 4,
    )  # fmt: skip
    return losses_N, logits_NV if wants_gradient else None
