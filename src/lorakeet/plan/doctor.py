"""What this machine has and what is missing, with what that costs and how to mend it."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lorakeet.base.gpu_code import APART, choose_packed_attention, has_triton
from lorakeet.base.native_code import find_native_code
from lorakeet.base.units import GIB, to_readable_bytes
from lorakeet.plan.hardware import Hardware, read_hardware

EXTRAS = {
    "tensorboard": ("tensorboard", "no curves in TensorBoard; the report has them"),
    "matplotlib": ("plots", "no confusion-matrix picture"),
    "pyarrow": ("parquet", "no Parquet files as data"),
}
MIN_DISK_BYTES = 5 * GIB
MIN_MEMORY_BYTES = 4 * GIB
CUDA_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu13")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Args:
        advice: what to do, or what is lost; empty when all is well.
    """

    name: str
    found: str
    is_ok: bool
    advice: str = ""


def check_machine(folder: Path = Path()) -> list[Finding]:
    """Everything that Lorakeet needs or can use, looked at without importing torch."""
    machine = read_hardware(folder)
    return [
        Finding(name="python", found=platform.python_version(), is_ok=sys.version_info >= (3, 11),
                advice="" if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed."),
        *_check_packages(machine),
        Finding(name="GPU", found=", ".join(gpu.name for gpu in machine.gpus) or "none", is_ok=True,
                advice="" if machine.gpus else "training runs on the CPU; small models only."),
        *_check_gpu_code(machine),
        _check_native_code(),
        Finding(name="cores", found=str(machine.cores), is_ok=True),
        _check_room("free memory", machine.free_memory_bytes, MIN_MEMORY_BYTES,
                    "close other programs or choose a smaller base."),
        _check_room("free disk", machine.disk_free_bytes, MIN_DISK_BYTES,
                    "models and checkpoints need room here."),
    ]  # fmt: skip


def _check_packages(machine: Hardware) -> list[Finding]:
    findings = [_check_torch(machine)]
    found = _version("transformers")
    findings.append(Finding(name="transformers", found=found or "absent", is_ok=bool(found),
                            advice="" if found else "pip install lorakeet brings it."))  # fmt: skip
    for name, (extra, loss) in EXTRAS.items():
        found = _version(name)
        advice = "" if found else f"{loss}; pip install 'lorakeet[{extra}]' adds it."
        findings.append(
            Finding(name=name, found=found or "absent", is_ok=bool(found), advice=advice)
        )
    return findings


def _check_torch(machine: Hardware) -> Finding:
    """The build of torch against the GPUs of this machine."""
    found = _version("torch")
    if not found:
        return Finding(name="torch", found="absent", is_ok=False,
                       advice="run 'python setup_torch.py' in the checkout.")  # fmt: skip
    has_cuda = "+cu" in found or any(map(_version, CUDA_RUNTIMES))
    build = "CUDA build" if has_cuda else "CPU build"
    if machine.gpus and not has_cuda:
        return Finding(name="torch", found=f"{found}, {build}", is_ok=False,
                       advice="there is a GPU, but this build cannot use it; reinstall torch."
        )  # fmt: skip
    return Finding(name="torch", found=f"{found}, {build}", is_ok=True)


def _check_gpu_code(machine: Hardware) -> list[Finding]:
    """What computes a training step on the GPU; nothing where there is none."""
    if not machine.gpus:
        return []
    attention, has_kernels = choose_packed_attention("cuda", "bfloat16"), has_triton()
    return [
        Finding(name="GPU kernels", found="Triton" if has_kernels else "absent", is_ok=has_kernels,
                advice="" if has_kernels else "norms, gates and the loss take torch's own calls, "
                "which move more bytes; torch's CUDA builds for Linux bring Triton."),
        Finding(name="packed attention", found=attention.way, is_ok=attention.way != APART,
                advice="" if attention.way != APART else attention.why),
    ]  # fmt: skip


def _check_native_code() -> Finding:
    """Which path multiplies with weights of 4 and 8 bits on the CPU."""
    native = find_native_code()
    return Finding(name="quantised weights", found=native.found, is_ok=native.is_usable,
                   advice="" if native.is_usable else "weights of 4 and 8 bits compute more slowly "
                   "on this CPU; 'pip install llvmlite' on an x86 machine with AVX2 mends it."
    )  # fmt: skip


def _check_room(name: str, free: int, needed: int, advice: str) -> Finding:
    is_ok = free >= needed
    return Finding(name=name, found=to_readable_bytes(free), is_ok=is_ok,
                   advice="" if is_ok else f"less than {to_readable_bytes(needed)}: {advice}"
    )  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
