"""Where the C library puts weights and activations, so that training reuses what it frees.

glibc puts arrays below a threshold (at most 32 MiB) side by side on one heap, and hands the
heap's freed end back to the system.  Both cost a training step on a CPU:

- A wide weight that is let go leaves a hole; what a step keeps goes into these holes first, as
  they fit better than the room that the step before has left, and both stay with the process.
  So weights are put apart while a base is loaded, each in pages of its own that go back to the
  system with it (``weights_apart``).
- A micro-batch keeps the layers' inputs until its backward pass and frees them there.  Given back,
  their pages are touched for the first time again by the next one: the system clears and maps
  each, some microseconds a page on a virtual machine.  A step of 2,000 tokens through four layers
  of a 135M model touched 25,000 pages so, 5 % of its processor time; kept, the peak is the same,
  as nothing is held beyond what was held at once (``keep_freed_memory``).

Other allocators and systems have no such call and are left as they are.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorakeet.base.units import MIB

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's settings, in glibc's malloc.h
_NEVER = -1
_APART_BYTES = MIB // 4
_USUAL_BYTES = 32 * MIB  # where glibc's own rule ends after the first array of that size


@contextmanager
def weights_apart() -> Iterator[None]:
    """Inside, arrays of 256 KiB and more lie in pages of their own, where glibc allocates."""
    _set(_MMAP_THRESHOLD, _APART_BYTES)
    try:
        yield
    finally:
        _set_usual()


@contextmanager
def keep_freed_memory() -> Iterator[bool]:
    """Inside, freed memory is used again without a way through the system; then it is given back.

    Yields:
        whether the allocator can be asked so.
    """
    can_keep = _set(_MMAP_THRESHOLD, _USUAL_BYTES) and _set(_TRIM_THRESHOLD, _NEVER)
    try:
        yield can_keep
    finally:
        _set_usual()
        give_back()


def give_back() -> None:
    """Hands freed memory to the system; glibc alone would keep the holes between what is held."""
    trim = _find("malloc_trim")
    if trim is not None:
        trim(0)


def _set_usual() -> None:
    """As glibc's own rule has it in a process that has let go of an array of 32 MiB."""
    _set(_MMAP_THRESHOLD, _USUAL_BYTES)
    _set(_TRIM_THRESHOLD, 2 * _USUAL_BYTES)


def _set(name: int, value: int) -> bool:
    """Changes a setting of the allocator; False where it has none."""
    change = _find("mallopt")
    return change is not None and bool(change(name, value))


def _find(name: str) -> Any:
    """A function of the C library; None where it is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
