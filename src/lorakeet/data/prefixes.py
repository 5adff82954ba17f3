"""Samples that open with the same tokens: which, how far, and what is saved.

The samples of a step are sorted by their ids; neighbours then share the longest openings,
and the shared lengths of neighbours tell those of every pair:

    shared(i, j) = min of shared(k, k + 1) over the neighbours between i and j

Openings become a tree whose nodes are computed once.  A node below ``MIN_SHARED_TOKENS``
is not worth a node: each one is another attention call in every layer.

All of this is a pure function of the step's samples, so a resumed run shares the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorakeet.base.records import EncodedSample
from lorakeet.data.order import StepOrder
from lorakeet.data.shards import ShardReader

MIN_SHARED_TOKENS = 16  # at 135M a token costs about as much as an attention call in each layer
MIN_SHARED_FRACTION = 0.03  # of a step's tokens; below it the samples are packed as they are
_MEASURED_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """The shared openings of some samples.

    Args:
        order: positions of the samples, sorted by their ids.
        depths: for each place of ``order`` the tokens shared with the place before; 0 first.
    """

    order: tuple[int, ...]
    depths: tuple[int, ...]

    @property
    def num_saved_tokens(self) -> int:
        """Tokens that need not be computed when all samples lie in one pack."""
        return sum(self.depths)

    def among(self, group: Sequence[int]) -> Prefixes:
        """The openings that only these samples share; positions are places in ``group``."""
        place_of = {position: place for place, position in enumerate(group)}
        order, depths, shared = [], [], 0
        for position, depth in zip(self.order, self.depths, strict=True):
            shared = min(shared, depth)
            if position in place_of:
                order.append(place_of[position])
                depths.append(shared)
                shared = np.iinfo(np.int64).max
        return Prefixes(order=tuple(order), depths=tuple(depths))

    def to_matrix(self) -> np.ndarray:
        """Tokens that each pair of samples shares, int64 [N, N]; the diagonal is 0."""
        size = len(self.order)
        shared = np.zeros((size, size), dtype=np.int64)
        for first in range(size):
            lowest = np.minimum.accumulate(np.asarray(self.depths[first + 1 :], dtype=np.int64))
            for place, depth in enumerate(lowest, first + 1):
                pair = self.order[first], self.order[place]
                shared[pair] = shared[pair[::-1]] = depth
        return shared


def find_prefixes(rows: Sequence[np.ndarray]) -> Prefixes:
    """The shared openings of rows of token ids.

    >>> system = list(range(20))
    >>> found = find_prefixes([np.array(system + [7, 8]), np.array([5]), np.array(system + [9])])
    >>> found.order, found.depths
    ((0, 2, 1), (0, 20, 0))
    """
    keys = [np.asarray(row).astype(">u4").tobytes() for row in rows]
    order = tuple(sorted(range(len(rows)), key=lambda i: (keys[i], i)))
    depths = [0] * len(rows)
    for place in range(1, len(order)):
        depths[place] = _count_shared(rows[order[place - 1]], rows[order[place]])
    _merge_small_nodes(depths, 0, len(depths), 0)
    return Prefixes(order=order, depths=tuple(depths))


def _count_shared(one: np.ndarray, two: np.ndarray) -> int:
    """Equal tokens at the head of two rows."""
    size = min(len(one), len(two))
    differs = np.flatnonzero(np.asarray(one[:size]) != np.asarray(two[:size]))
    return int(differs[0]) if len(differs) else size


def _merge_small_nodes(depths: list[int], first: int, end: int, start: int) -> None:
    """Lowers shared lengths to the nodes that are long enough; works in place.

    The rows ``first`` to ``end`` lie below one node that ends at token ``start``.
    """
    if end - first < 2:
        return
    common = min(depths[first + 1 : end])
    if common >= start + MIN_SHARED_TOKENS:
        start = common
    head = first
    for place in range(first + 1, end + 1):
        if place == end or depths[place] < start + MIN_SHARED_TOKENS:
            _merge_small_nodes(depths, head, place, start)
            head = place
            if place < end:
                depths[place] = start


def pack_shared_rows(
    lengths: Sequence[int], prefixes: Prefixes, max_tokens: int
) -> list[list[int]]:
    """The rows of a step in packs of at most ``max_tokens``, where a shared token counts once.

    Best-fit decreasing as in ``pack_rows``, but a row goes first where it shares most.

    Returns:
        positions within the step, each exactly once.
    """
    shared = prefixes.to_matrix()
    packs: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        best = None
        for number, pack in enumerate(packs):
            overlap = int(shared[place, pack].max())
            left = room[number] - lengths[place] + overlap
            if left >= 0 and (best is None or (-overlap, left, number) < best):
                best = (-overlap, left, number)
        if best is None:
            packs.append([place])
            room.append(max_tokens - lengths[place])
        else:
            packs[best[2]].append(place)
            room[best[2]] = best[1]
    return packs


def choose_prefixes(samples: Sequence[EncodedSample]) -> Prefixes | None:
    """The shared openings of a step's samples; None where they save too little."""
    prefixes = find_prefixes([sample.ids for sample in samples])
    num_tokens = sum(len(sample.ids) for sample in samples)
    return prefixes if prefixes.num_saved_tokens >= MIN_SHARED_FRACTION * num_tokens else None


def measure_saved_fraction(
    rows: Sequence[EncodedSample] | ShardReader, order: StepOrder, max_tokens: int
) -> float:
    """The share of tokens that sharing saves, over the first steps of a run.

    Args:
        max_tokens: of a pack; an opening stands once in each pack.

    Cost: the rows of eight steps.
    """
    saved = num_tokens = 0
    for step in range(1, min(order.num_steps, _MEASURED_STEPS) + 1):
        samples = [rows[row] for row in order.rows_of_step(step)]
        lengths = [len(sample.ids) for sample in samples]
        num_tokens += sum(lengths)
        if (prefixes := choose_prefixes(samples)) is not None:
            groups = pack_shared_rows(lengths, prefixes, max_tokens)
            saved += sum(prefixes.among(group).num_saved_tokens for group in groups)
    return saved / max(num_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class PrefixTree:
    """Shared openings laid out as one row of segments, each node before what follows it.

    Args:
        bounds: S + 1 places; segment s is tokens ``bounds[s]`` to ``bounds[s + 1]``.
        parents: of each segment the one that stands before it in its samples, or -1.
        paths: of each sample the segments that make it up.
    """

    bounds: tuple[int, ...]
    parents: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]


def lay_out(lengths: Sequence[int], prefixes: Prefixes) -> PrefixTree:
    """The segments of samples with shared openings, in the order of the sorted samples.

    >>> lay_out([22, 21], Prefixes(order=(0, 1), depths=(0, 20)))
    PrefixTree(bounds=(0, 20, 22, 23), parents=(-1, 0, 0), paths=((0, 1), (0, 2)))
    """
    bounds, parents = [0], []
    paths: list[tuple[int, ...]] = [()] * len(lengths)

    def add(size: int, path: tuple[int, ...]) -> tuple[int, ...]:
        if not size:
            return path
        parents.append(path[-1] if path else -1)
        bounds.append(bounds[-1] + size)
        return (*path, len(parents) - 1)

    def grow(first: int, end: int, start: int, path: tuple[int, ...]) -> None:
        if end - first == 1:
            row = prefixes.order[first]
            paths[row] = add(lengths[row] - start, path)
            return
        common = min(prefixes.depths[first + 1 : end])
        path, start = add(common - start, path), common
        head = first
        for place in range(first + 1, end + 1):
            if place == end or prefixes.depths[place] == common:
                grow(head, place, start, path)
                head = place

    if lengths:
        grow(0, len(lengths), 0, ())
    return PrefixTree(bounds=tuple(bounds), parents=tuple(parents), paths=tuple(paths))
