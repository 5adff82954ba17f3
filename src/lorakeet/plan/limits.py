"""Limits of memory below what the machine has: of a container, and of the process.

A container's limit is its control group's: in version 2 ``memory.max`` of the group and of
every group around it, in version 1 ``memory.limit_in_bytes``.  What lies in files that the
system can drop (``inactive_file``) is free again when it is needed.  A shell's ``ulimit -v``
bounds the addresses of one process.

Source: the Linux kernel's documents cgroup-v2.rst and cgroup-v1/memory.rst; getrlimit(2).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from lorakeet.base.units import KIB

GROUPS, PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self")
_NAMES = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}


def count_allowed_bytes(groups: Path = GROUPS, process: Path = PROCESS) -> int | None:
    """Bytes that this process may still take; None where nothing limits it.

    Args:
        groups: where the control groups are mounted.
        process: the process's folder of the system.
    """
    found = [_left_in(folder) for folder in _list_groups(groups, process)]
    found.append(_left_of_addresses(process))
    return min((max(0, left) for left in found if left is not None), default=None)


def _list_groups(groups: Path, process: Path) -> Iterator[Path]:
    """The folders of the process's group and of the groups around it."""
    for line in _read(process / "cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers in ("", "memory") or "memory" in controllers.split(","):
            root = groups / "memory" if controllers else groups
            inner = root / path.strip("/")
            yield from (inner, *(p for p in inner.parents if p.is_relative_to(root)))


def _left_in(folder: Path) -> int | None:
    """The limit of a group less what it holds for good."""
    for limit_name, used_name in _NAMES.items():
        limit, used = _read(folder / limit_name).strip(), _read(folder / used_name).strip()
        if limit.isdigit() and used.isdigit():
            stat = re.search(
                r"^(?:total_)?inactive_file (\d+)", _read(folder / "memory.stat"), re.M
            )
            return int(limit) - int(used) + (int(stat[1]) if stat else 0)
    return None


def _left_of_addresses(process: Path) -> int | None:
    """What ``ulimit -v`` leaves."""
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    size = re.search(r"^VmSize:\s*(\d+) kB", _read(process / "status"), re.M)
    if limit == resource.RLIM_INFINITY or not size:
        return None
    return limit - int(size[1]) * KIB


def _read(path: Path) -> str:
    """A file of the system; empty where there is none that can be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
