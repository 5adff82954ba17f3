"""The most memory that this process has held, as the system or the GPU counts it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from lorakeet.base.units import KIB

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int | None:
    """Peak bytes: of the GPU's allocator where one is used, else resident in main memory.

    The resident peak counts the whole process since its start: libraries, data and model.
    Linux tells it as VmHWM; ru_maxrss, which it has too, begins at the size of the process
    that started this one.  None where the system does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.is_file():
        told = re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
        if told:
            return int(told[1]) * KIB
    if sys.platform == "win32":
        return None
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * KIB
