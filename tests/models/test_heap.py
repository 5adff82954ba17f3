"""Freed memory stays with the process while it trains, and no longer."""

import sys
from pathlib import Path

import pytest
import torch

from lorakeet.base.units import MIB
from lorakeet.models.heap import keep_freed_memory

PAGE = 4096


def hold(num_arrays):
    """Arrays of 8 MiB, all touched; the pages that were not yet in place."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2 * MIB) for _ in range(num_arrays)]
    assert all(float(each[-1]) == 1 for each in held)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone can be asked")
def test_freed_memory_is_found_in_place_and_given_back_at_the_end():
    with keep_freed_memory() as can_ask:
        if not can_ask:
            pytest.skip("this C library has no mallopt")
        assert min(hold(10) for _ in range(4)) < 10 * 8 * MIB / PAGE / 20
        kept = resident_bytes()
    assert resident_bytes() < kept - 60 * MIB
    assert hold(10) > 10 * 8 * MIB / PAGE / 2
