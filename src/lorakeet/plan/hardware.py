"""What this machine has: cores, memory, GPUs, disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path

import psutil

from lorakeet.base.units import MIB
from lorakeet.plan.limits import count_allowed_bytes


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine in numbers.

    Args:
        free_memory_bytes: main memory that could be taken at the moment, within the limits of
            a container and of the process.
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
    memory, allowed = psutil.virtual_memory(), count_allowed_bytes()
    free = memory.available if allowed is None else min(memory.available, allowed)
    return Hardware(
        cores=_count_cores(), memory_bytes=memory.total, free_memory_bytes=free,
        disk_free_bytes=shutil.disk_usage(folder).free, gpus=read_gpus(),
    )  # fmt: skip


def read_training_hardware(folder: Path = Path()) -> Hardware:
    """This machine as training sees it: without GPUs where torch is a build for the CPU."""
    machine = read_hardware(folder)
    try:
        is_cpu_build = "+cpu" in version("torch")
    except PackageNotFoundError:
        return machine
    return replace(machine, gpus=()) if is_cpu_build else machine


def read_gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs with their memory; none where the driver's tool is missing or fails.

    Numbers in CUDA_VISIBLE_DEVICES choose among them, as CUDA itself does.
    """
    tool = shutil.which("nvidia-smi")
    if not tool:
        return ()
    asked = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [line.rsplit(",", 1) for line in told.splitlines() if "," in line]
    found = [
        Gpu(name=name.strip(), memory_bytes=int(mib) * MIB)
        for name, mib in rows
        if mib.strip().isdigit()
    ]
    return tuple(_select_visible(found, os.environ.get("CUDA_VISIBLE_DEVICES")))


def _select_visible(gpus: list[Gpu], asked: str | None) -> list[Gpu]:
    """The GPUs that are not hidden; the list ends at the first number that is none of them.

    >>> cards = [Gpu(name=name, memory_bytes=1) for name in "ab"]
    >>> [len(_select_visible(cards, asked)) for asked in (None, "", "-1", "1", "1,0", "GPU-8f")]
    [2, 0, 0, 1, 2, 2]
    """
    if asked is None or asked.startswith(("GPU-", "MIG-")):
        return gpus
    numbers = [int(n) if n.strip().isdigit() else -1 for n in asked.split(",")]
    return [gpus[n] for n in takewhile(lambda n: 0 <= n < len(gpus), numbers)]


def _count_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
