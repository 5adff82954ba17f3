"""The most memory that this process has held, as the system or the GPU counts it."""

from __future__ import annotations

import sys

import torch

from lorakeet.base.units import KIB


def peak_bytes() -> int | None:
    """Peak bytes: of the GPU's allocator where one is used, else resident in main memory.

    The resident peak counts the whole process since its start: libraries, data and model.
    None where the system does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * KIB
