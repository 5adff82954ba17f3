"""Where the C library puts a base's weights, so that training finds a heap without holes.

glibc puts arrays below a threshold (at most 32 MiB) side by side on one heap.  A wide weight that
is let go leaves a hole there; what a step keeps goes into these holes first, as they fit better
than the room that the step before has left, and both stay with the process.  So weights are put
apart while a base is loaded, each in pages of its own that go back to the system with it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorakeet.base.units import MIB

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
_APART_BYTES = MIB // 4
_USUAL_BYTES = 32 * MIB  # where glibc's own rule ends after the first array of that size


@contextmanager
def weights_apart() -> Iterator[None]:
    """Inside, arrays of 256 KiB and more lie in pages of their own, where glibc allocates."""
    change: Any = _find("mallopt")
    if change is None:
        yield
        return
    change(_MMAP_THRESHOLD, _APART_BYTES)
    try:
        yield
    finally:
        change(_MMAP_THRESHOLD, _USUAL_BYTES)
        change(_TRIM_THRESHOLD, 2 * _USUAL_BYTES)  # as glibc's own rule has it


def give_back() -> None:
    """Hands freed memory to the system; glibc alone would keep the holes between what is held."""
    trim: Any = _find("malloc_trim")
    if trim is not None:
        trim(0)


def _find(name: str) -> Any:
    """A function of the C library; None where it is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
