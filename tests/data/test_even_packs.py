"""Packs of a step that are even: as few as the fullest, and the largest one smaller."""

import random

import numpy as np
import pytest

from lorakeet.data.packing import pack_evenly, pack_rows
from lorakeet.data.prefixes import find_prefixes, pack_shared_rows


def size(rows, lengths, prefixes):
    saved = prefixes.among(rows).num_saved_tokens if prefixes else 0
    return sum(lengths[row] for row in rows) - saved


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shares", [True, False])
def test_even_packs_are_as_few_and_compute_as_little(seed, shares):
    draw = random.Random(seed)
    lengths = [min(512, 60 + int(draw.lognormvariate(5.2, 0.6))) for _ in range(8)]
    openings = [[k] * 60 for k in (1, 2)]
    rows = [np.array(openings[n % 2] + [draw.randrange(10**6) for _ in range(length - 60)])
            for n, length in enumerate(lengths)]  # fmt: skip
    prefixes = find_prefixes(rows) if shares else None
    full = pack_shared_rows(lengths, prefixes, 1024) if shares else pack_rows(lengths, 1024)
    even = pack_evenly(lengths, prefixes, 1024)
    assert sorted(row for pack in even for row in pack) == list(range(8))
    assert len(even) <= len(full)
    sizes = [[size(pack, lengths, prefixes) for pack in packs] for packs in (even, full)]
    assert sum(sizes[0]) <= sum(sizes[1]) and max(sizes[0]) <= max(sizes[1]) <= 1024


def test_rows_of_two_packs_that_best_fit_fills_unevenly_are_spread():
    lengths = [500, 300, 200, 150, 100]
    assert [sum(lengths[i] for i in pack) for pack in pack_rows(lengths, 1024)] == [1000, 250]
    assert max(sum(lengths[i] for i in pack) for pack in pack_evenly(lengths, None, 1024)) <= 650


def test_a_row_above_the_limit_still_stands_alone():
    assert sorted(pack_evenly([900, 50, 60], None, 100)) == [[0], [1], [2]]
