"""PiSSA: an adapter that starts on the principal directions of its weight.

    W0 = U S V^T        A0 = sqrt(S_r / s) V_r^T        B0 = U_r sqrt(S_r / s)

s is the adapter's scale, so s B0 A0 is the best approximation of W0 at rank r, and
the residual W0 - s B0 A0 is frozen.  Here the base stays as it is and A0, B0 are kept:

    W' = W0 + s (B A - B0 A0)        equal to W0 at step 0, bit for bit

This is the same function as the paper's, and the plain LoRA of rank 2 r with
A' = [A; A0] and B' = [B, -B0] on the original base, which every reader of LoRA loads.

Source: arXiv:2404.02948, sections 3 (exact) and 5.3 (fast SVD).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.adapters.settings import PISSA_FAST

POWER_STEPS = 16  # the paper: more steps, a loss as low as that of the exact SVD
OVERSAMPLING = 8  # extra columns of the sketch; arXiv:0909.4061, section 4.2 advises 5 to 10


def principal_factors(
    W0: Tensor, r: int, scale: float, *, start: str, seed: int
) -> tuple[Tensor, Tensor]:
    """(A0 [r, in], B0 [out, r]) of a weight.

    Args:
        W0: float32 [out, in]; read, never changed.
        r: at most min(in, out).
        start: ``pissa`` for the exact SVD, ``pissa-fast`` for a randomised one.
        seed: of the sketch.

    Guarantees:
        exact: ||W0 - s B0 A0|| is the least of all matrices of rank r.

    Cost: exact O(out in min(out, in)); fast O(out in r).
    """
    if start == PISSA_FAST:
        U, S, Vt = _sketched_svd(W0, r, seed)
    else:
        U, S, Vt = torch.linalg.svd(W0, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return (root[:, None] * Vt[:r]).contiguous(), (U[:, :r] * root).contiguous()


def _sketched_svd(W0: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets by subspace iteration (arXiv:0909.4061, algorithm 4.4)."""
    width = min(r + OVERSAMPLING, *W0.shape)
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(W0.shape[1], width, generator=generator).to(W0.device)
    Q = torch.linalg.qr(W0 @ sketch)[0]
    for _ in range(POWER_STEPS):
        Q = torch.linalg.qr(W0.T @ Q)[0]
        Q = torch.linalg.qr(W0 @ Q)[0]
    U, S, Vt = torch.linalg.svd(Q.T @ W0, full_matrices=False)
    return Q @ U, S, Vt
