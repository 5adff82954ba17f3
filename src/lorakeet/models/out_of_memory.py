"""What to do when memory runs out: the same work again, in smaller pieces.

An allocator's refusal leaves everything as it was, except for what the failed attempt
holds; that is let go before the next attempt, so the smaller one finds the room.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
# torch raises OutOfMemoryError for its own GPU allocator and plain RuntimeError elsewhere
_WORDS = (
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "out of memory",
    "cublas_status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or in main memory.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _WORDS)


def halve_until_fits(
    work: Callable[[int], T], size: int, next_size: Callable[[int], int]
) -> tuple[T, int]:
    """``work(size)``, done again with a smaller size each time memory runs out.

    Args:
        work: has no effect that a second call would not make good.
        next_size: the size to try after one that did not fit; raises when there is none.

    Returns:
        the work's result, and the size that fitted.
    """
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # outside of the except block the failed attempt's frames, and their tensors, are gone
        _let_go()
        size = next_size(size)


def _let_go() -> None:
    """Gives back what cycles and the GPU's cache still hold."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
