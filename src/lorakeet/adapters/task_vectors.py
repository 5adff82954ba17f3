"""Merging task vectors element by element: plain sums, TIES and DARE.

    linear   sum_i w_i t_i                                            arXiv:2212.04089
    TIES     trim each t_i to its largest share, elect one sign an element by the larger
             mass, then average the elements of that sign only        arXiv:2306.01708
    DARE     drop elements at random and rescale the others by 1 / density, so that the
             expectation stays; then a sum, or TIES' election         arXiv:2311.03099

A negative weight subtracts: its vector is turned round before signs are elected.
Where PEFT 0.21 differs: it elects signs of the unturned vectors and weights them
afterwards, and takes a sum of exactly zero for positive, so that a vector less itself
leaves its magnitudes there; here it leaves zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Thinning:
    """How task vectors are thinned out and put together.

    Args:
        method: ``linear``, ``ties``, ``dare`` or ``dare-ties``.
        density: share of the elements that stay, above 0 to 1; linear keeps all.
        seed: DARE draws from (seed, place, position of the vector), so the order in which
            layers are visited does not matter.
    """

    method: str
    density: float = 1.0
    seed: int = 0


def merge_vectors(
    vectors: Sequence[Tensor], weights: Sequence[float], how: Thinning, *, place: str
) -> Tensor:
    """One tensor of several of one shape.

    Args:
        place: the layer's name (and factor), which DARE's random numbers follow from.
    """
    thin = list(vectors)
    if how.method == "ties":
        thin = [trim(each, how.density) for each in vectors]
    elif how.method.startswith("dare"):
        seeds = [seed_of(how.seed, place, position) for position in range(len(vectors))]
        thin = [drop(t, how.density, seed) for t, seed in zip(vectors, seeds, strict=True)]
    weighted = torch.stack([w * t for w, t in zip(weights, thin, strict=True)])
    if not how.method.endswith("ties"):
        return weighted.sum(0)
    turned = torch.stack([t if w >= 0 else -t for w, t in zip(weights, thin, strict=True)])
    elected = turned.sum(0).sign()  # 0 where they cancel: nobody is heard there
    agrees = (turned.sign() == elected) & (elected != 0)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def trim(vector: Tensor, density: float) -> Tensor:
    """The elements of largest magnitude, a share ``density`` of all; the others become zero.

    >>> trim(torch.tensor([3.0, -4.0, 1.0, 0.5]), 0.5).tolist()
    [3.0, -4.0, 0.0, 0.0]
    """
    flat = vector.flatten()
    kept = torch.zeros_like(flat)
    places = flat.abs().topk(int(density * flat.numel())).indices
    kept[places] = flat[places]
    return kept.view_as(vector)


def drop(vector: Tensor, density: float, seed: int) -> Tensor:
    """Each element with probability ``density``, divided by it; the others become zero."""
    generator = torch.Generator().manual_seed(seed)
    stays = torch.bernoulli(torch.full(vector.shape, density), generator=generator)
    return vector * stays.to(vector.dtype) / density


def seed_of(seed: int, place: str, position: int) -> int:
    """A seed of (seed, layer and factor, which of the adapters)."""
    text = f"{seed}|{place}|{position}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
