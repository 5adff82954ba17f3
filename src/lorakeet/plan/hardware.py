"""What this machine has: cores, memory, GPUs, disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from lorakeet.base.units import MIB


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine in numbers.

    Args:
        free_memory_bytes: main memory that could be taken at the moment.
    """

    cores: int
    memory_bytes: int
    free_memory_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...] = ()

    @property
    def usable_bytes(self) -> int:
        """Memory that training can use: of the largest GPU, else free main memory."""
        if self.gpus:
            return max(gpu.memory_bytes for gpu in self.gpus)
        return self.free_memory_bytes

    @property
    def name(self) -> str:
        """The device that training runs on, in words."""
        if self.gpus:
            return max(self.gpus, key=lambda gpu: gpu.memory_bytes).name
        return f"CPU, {self.cores} cores"


def read_hardware(folder: Path = Path()) -> Hardware:
    """This machine; GPUs through the driver's own ``nvidia-smi``, without torch."""
    memory = psutil.virtual_memory()
    return Hardware(
        cores=_count_cores(),
        memory_bytes=memory.total, free_memory_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(folder).free, gpus=read_gpus(),
    )  # fmt: skip


def read_gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs with their memory; none where the driver's tool is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return ()
    asked = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [line.rsplit(",", 1) for line in told.splitlines() if "," in line]
    return tuple(
        Gpu(name=name.strip(), memory_bytes=int(mib) * MIB)
        for name, mib in rows
        if mib.strip().isdigit()
    )


def _count_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
