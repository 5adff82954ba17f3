"""The algebra of low-rank changes B A, without ever forming the full matrix.

A change of a layer is B A with B [out, r] and A [r, in].  With B = Q_B R_B and
A^T = Q_A R_A (Q orthonormal) everything that a norm or a singular value can see of it
lies in a core of r x r numbers:

    B A = Q_B (R_B R_A^T) Q_A^T        ||B A||_F = ||R_B R_A^T||_F

A sum is a longer product, [B1 B2] [A1; A2], so sums and differences stay in this form.
Cost: O((in + out) r^2) instead of O(in out r).  All figures are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A change B A.

    Args:
        B: float64 [out, r], any scale already in it.
        A: float64 [r, in].
    """

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """r, the inner size; the matrix's own rank may be less."""
        return self.A.shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out)."""
        return self.A.shape[1], self.B.shape[0]

    def to_matrix(self) -> Tensor:
        """B A itself, float64 [out, in]: for the few things that need every element."""
        return self.B @ self.A


def add_changes(changes: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """sum_i w_i B_i A_i as one product, exactly; its r is the sum of theirs.

    >>> one = LowRank(B=torch.eye(2).double(), A=torch.eye(2).double())
    >>> add_changes([one, one], [1.0, -0.25]).to_matrix().tolist()
    [[0.75, 0.0], [0.0, 0.75]]
    """
    return LowRank(
        B=torch.cat([w * each.B for each, w in zip(changes, weights, strict=True)], dim=1),
        A=torch.cat([each.A for each in changes], dim=0),
    )


def compress_change(change: LowRank, rank: int) -> LowRank:
    """The best approximation of a change with at most ``rank``, in the Frobenius norm.

    From the core's singular value decomposition U S V^T:

        B' = Q_B U_r S_r^1/2        A' = S_r^1/2 V_r^T Q_A^T

    Returns:
        r = min(rank, the change's own r, in, out).

    Source: Eckart and Young, 1936.
    """
    Q_B, R_B = torch.linalg.qr(change.B)
    Q_A, R_A = torch.linalg.qr(change.A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = S[:rank].sqrt()
    return LowRank(B=Q_B @ (U[:, :rank] * root), A=(root[:, None] * Vh[:rank]) @ Q_A.T)


def compress_matrix(matrix: Tensor, rank: int) -> LowRank:
    """The best approximation of a full matrix [out, in] with at most ``rank``.

    Cost: a whole SVD, O(out in min(out, in)).
    """
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = S[:rank].sqrt()
    return LowRank(B=U[:, :rank] * root, A=root[:, None] * Vh[:rank])


def norm_of(change: LowRank) -> float:
    """||B A||_F."""
    return float(torch.linalg.norm(_core(change)))


def distance(one: LowRank, other: LowRank) -> float:
    """||B1 A1 - B2 A2||_F, from the factors of the difference, so that near changes stay exact."""
    return norm_of(add_changes([one, other], [1.0, -1.0]))


def inner_product(one: LowRank, other: LowRank) -> float:
    """<B1 A1, B2 A2> = trace(B2^T B1 A1 A2^T), the sum over all elements of the products."""
    return float(((other.B.T @ one.B) * (other.A @ one.A.T)).sum())


def column_space(factor: Tensor) -> Tensor:
    """Orthonormal columns that span a factor's columns, float64 [n, i].

    i leaves out directions below ``max(n, r) * eps`` of the largest singular value, so
    that an untrained B (all zero) spans nothing.
    """
    U, S, _ = torch.linalg.svd(factor, full_matrices=False)
    eps = torch.finfo(torch.float32).eps  # factors are trained and kept in float32
    smallest = S.max().clamp_min(1e-300) * max(factor.shape) * eps
    return U[:, smallest < S]


def _core(change: LowRank) -> Tensor:
    """R_B R_A^T, at most [r, r]."""
    return torch.linalg.qr(change.B, mode="r").R @ torch.linalg.qr(change.A.T, mode="r").R.T
