"""Two adapters side by side, layer by layer, from their factors alone.

    norms      ||D1||, ||D2||, ||D1 - D2||  with D = s B A, Frobenius
    cosine     <D1, D2> / (||D1|| ||D2||)
    overlap    phi = ||U1^T U2||_F^2 / min(i, j) for spaces with orthonormal bases
               U1 [n, i] and U2 [n, j]; 1 where one holds the other, 0 where they are
               orthogonal

The spaces are what a layer listens to (the rows of A, in the input) and what it can say
(the columns of B, in the output).  Two random spaces already overlap by
max(i, j) / n, which is given beside phi as ``chance``.  The singular values of U1^T U2
are the cosines of the principal angles.

Source: arXiv:2106.09685, section 7.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.adapters.low_rank import column_space, distance, inner_product, norm_of
from lorakeet.adapters.stored import StoredAdapter, StoredLayer, some
from lorakeet.base.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How much two spaces share.

    Args:
        phi: 0 to 1.
        chance: what random spaces of these sizes share on average.
        angles: principal angles in degrees, the smallest first.
    """

    phi: float
    chance: float
    angles: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """One layer of two adapters; a missing layer changes nothing.

    Args:
        ranks: r of each, 0 where it has no such layer.
        norms: ||D|| of each.
        distance: ||D1 - D2||.
        cosine: -1 to 1; None where a change is zero.
        inputs: overlap of the row spaces of A; None where one is empty.
        outputs: overlap of the column spaces of B, likewise.
    """

    ranks: tuple[int, int]
    norms: tuple[float, float]
    distance: float
    cosine: float | None
    inputs: Overlap | None
    outputs: Overlap | None


def compare_adapters(one: StoredAdapter, other: StoredAdapter) -> dict[str, LayerDifference]:
    """Every layer that either adapter changes, in the order of their names.

    Raises:
        RequestError: layers of one name have different sizes, so the bases differ.
    """
    shared = one.layers.keys() & other.layers.keys()
    odd = [m for m in sorted(shared) if _sizes(one.layers[m]) != _sizes(other.layers[m])]
    if odd:
        raise RequestError(
            f"{some(odd)}: the sizes differ between {one.folder} and {other.folder}, so they "
            "belong to different bases and cannot be compared. Choose two of one base."
        )
    modules = sorted(one.layers.keys() | other.layers.keys())
    return {m: _compare_layers(one.layers.get(m), other.layers.get(m)) for m in modules}


def measure_norms(adapter: StoredAdapter) -> dict[str, float]:
    """||s B A|| of every layer."""
    return {module: norm_of(layer.to_change()) for module, layer in adapter.layers.items()}


def sum_up(layers: Mapping[str, LayerDifference]) -> LayerDifference:
    """All layers as one long vector: norms and distance add in squares.

    Overlaps are means over the layers that have them, with no angles.
    """
    rows = list(layers.values())
    norms = [sum(row.norms[side] ** 2 for row in rows) ** 0.5 for side in (0, 1)]
    inner = sum(row.cosine * row.norms[0] * row.norms[1] for row in rows if row.cosine is not None)
    return LayerDifference(
        ranks=tuple(max((row.ranks[side] for row in rows), default=0) for side in (0, 1)),
        norms=tuple(norms),
        distance=sum(row.distance**2 for row in rows) ** 0.5,
        cosine=inner / (norms[0] * norms[1]) if norms[0] and norms[1] else None,
        inputs=_mean([row.inputs for row in rows if row.inputs]),
        outputs=_mean([row.outputs for row in rows if row.outputs]),
    )


def measure_overlap(one: Tensor, other: Tensor) -> Overlap | None:
    """The overlap of the column spaces of two matrices [n, r]; None where one is zero."""
    U1, U2 = column_space(one), column_space(other)
    i, j, n = U1.shape[1], U2.shape[1], U1.shape[0]
    if not i or not j:
        return None
    cosines = torch.linalg.svdvals(U1.T @ U2).clamp(max=1.0)
    return Overlap(
        phi=float(cosines.square().sum()) / min(i, j),
        chance=max(i, j) / n,
        angles=tuple(torch.rad2deg(torch.acos(cosines)).tolist()),
    )


def _compare_layers(one: StoredLayer | None, other: StoredLayer | None) -> LayerDifference:
    """One layer; at most one of the two is missing."""
    if one is None or other is None:
        own = (one or other).to_change()
        norm = norm_of(own)
        pair = (lambda a, b: (a, b)) if other is None else (lambda a, b: (b, a))
        return LayerDifference(
            ranks=pair(own.rank, 0), norms=pair(norm, 0.0), distance=norm, cosine=None,
            inputs=None, outputs=None,
        )  # fmt: skip
    D1, D2 = one.to_change(), other.to_change()
    norms = norm_of(D1), norm_of(D2)
    cosine = inner_product(D1, D2) / (norms[0] * norms[1]) if norms[0] and norms[1] else None
    return LayerDifference(
        ranks=(D1.rank, D2.rank),
        norms=norms,
        distance=distance(D1, D2),
        cosine=None if cosine is None else max(-1.0, min(1.0, cosine)),
        inputs=measure_overlap(D1.A.T, D2.A.T),
        outputs=measure_overlap(D1.B, D2.B),
    )


def _mean(overlaps: list[Overlap]) -> Overlap | None:
    """The mean phi and chance of several overlaps."""
    if not overlaps:
        return None
    number = len(overlaps)
    return Overlap(
        phi=sum(each.phi for each in overlaps) / number,
        chance=sum(each.chance for each in overlaps) / number,
        angles=(),
    )


def _sizes(layer: StoredLayer) -> tuple[tuple[int, ...], int]:
    return tuple(layer.A.shape[1:]), layer.B.shape[0]
