"""Samples laid end to end in one row, so that no slot of a batch is padding.

Each document keeps its own positions and attends to itself alone (``models.packed``),
so a packed step gives the gradients of one sample at a time.

Legend: T tokens of the pack, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorakeet.base.errors import RequestError
from lorakeet.base.records import EncodedSample, Pack
from lorakeet.data.prefixes import Prefixes, lay_out, pack_shared_rows

_TRIES = 5  # halvings: the limit to a sixty-fourth
_MOST_EVEN_PACKS = 8  # of more, even packs are less than an eighth smaller


def pack_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The rows of a step in packs of at most ``max_tokens``: best fit, the longest first.

    Each row goes into the fullest pack that still has room for it (best-fit decreasing,
    arXiv:2404.10830 section 3); a row above the limit stands alone.  No row is cut.

    Returns:
        positions within the step, each exactly once.

    >>> pack_rows([10, 90, 12, 88], max_tokens=100)
    [[1, 0], [3, 2]]
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(free, i) for i, free in enumerate(room) if free >= lengths[place]]
        if fitting:
            _, chosen = min(fitting)
            packs[chosen].append(place)
            room[chosen] -= lengths[place]
        else:
            packs.append([place])
            room.append(max_tokens - lengths[place])
    return packs


def pack_evenly(
    lengths: Sequence[int], prefixes: Prefixes | None, max_tokens: int
) -> list[list[int]]:
    """The rows of a step in as few packs as ``max_tokens`` allows, the largest as small as found.

    Best fit fills all packs but the last, and the largest one needs the memory; a lower limit
    that takes no more packs, and computes no more tokens, spreads the same rows evenly.

    Args:
        prefixes: the openings that the rows share, of which each pack has one; None shares none.

    Returns:
        positions within the step, each exactly once.

    Cost: packing six times; once where there are too many packs to gain by it.

    >>> pack_evenly([40, 40, 40, 40, 40, 40], None, max_tokens=200)
    [[0, 1, 2], [3, 4, 5]]
    """

    def pack(limit: int) -> list[list[int]]:
        if prefixes is None:
            return pack_rows(lengths, limit)
        return pack_shared_rows(lengths, prefixes, limit)

    def count_saved(packs: list[list[int]]) -> int:
        return sum(prefixes.among(rows).num_saved_tokens for rows in packs) if prefixes else 0

    packs, low, high = pack(max_tokens), max_tokens // 2, max_tokens
    tries = _TRIES if 1 < len(packs) <= _MOST_EVEN_PACKS else 0
    for _ in range(tries):
        middle = (low + high) // 2
        tried = pack(middle)
        if len(tried) <= len(packs) and count_saved(tried) >= count_saved(packs):
            packs, high = tried, middle
        else:
            low = middle
    return packs


def build_pack(samples: Sequence[EncodedSample], prefixes: Prefixes | None = None) -> Pack:
    """Samples end to end, what they share standing once.

    Args:
        prefixes: the openings that these samples share; None lays each sample whole.

    Raises:
        RequestError: there is no sample, or no sample has anything to train.

    Guarantees: every token of every sample stands in the row, and every trained token is
        counted once for each sample that trains it.
    """
    if not samples:
        raise RequestError("a pack needs at least one sample.")
    lengths = [len(sample.ids) for sample in samples]
    apart = Prefixes(order=tuple(range(len(samples))), depths=(0,) * len(samples))
    tree = lay_out(lengths, prefixes or apart)
    ids_T, positions_T, counts_T = (np.zeros(tree.bounds[-1], dtype=np.int64) for _ in range(3))
    for sample, path in zip(samples, tree.paths, strict=True):
        places = np.concatenate([np.arange(tree.bounds[s], tree.bounds[s + 1]) for s in path])
        ids_T[places] = sample.ids
        positions_T[places] = np.arange(len(places))
        counts_T[places] += np.asarray(sample.mask, dtype=bool)
    pack = Pack(
        ids_T=ids_T, positions_T=positions_T, counts_T=counts_T, bounds=tree.bounds,
        parents=tree.parents if any(parent >= 0 for parent in tree.parents) else (),
        labels_N=np.asarray([sample.label for sample in samples], dtype=np.int64),
    )  # fmt: skip
    if not pack.num_targets:
        places = ", ".join(str(sample.origin) for sample in samples[:3])
        raise RequestError(f"a pack without any trained token ({places}) cannot be built.")
    return pack
