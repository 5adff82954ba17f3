"""Installs the torch build that fits this machine, before Lorakeet itself.

The default Linux wheel of torch brings gigabytes of CUDA packages.  On a machine
without an NVIDIA GPU this script takes a CPU build instead: the one that pip
finds by itself where it already prefers one, else the one of PyTorch's own index.
With a GPU, pip's default is the right one.  Only the standard library is used.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def read_requirement() -> str:
    """The range of torch in pyproject.toml."""
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    return next(item for item in project["dependencies"] if item.startswith("torch"))


def has_nvidia_gpu() -> bool:
    """Whether the driver's own tool lists a GPU."""
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def run_pip(*arguments: str) -> bool:
    """Whether a pip command succeeded; its output goes to the terminal."""
    return subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode == 0


def would_bring_cuda(requirement: str) -> bool:
    """Whether pip's own choice of torch needs CUDA packages, asked without installing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        if not run_pip("install", "-q", "--dry-run", "--report", str(report), requirement):
            return True
        names = [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]
    return any(name.lower().startswith(("nvidia", "cuda")) for name in names)


def main() -> int:
    """Installs torch; the exit code is 0 when a fitting build is in place."""
    requirement = read_requirement()
    is_linux = platform.system() == "Linux"
    if not is_linux or has_nvidia_gpu() or not would_bring_cuda(requirement):
        return 0 if run_pip("install", requirement) else 1
    print("No NVIDIA GPU here: taking the CPU build of torch.")
    if run_pip("install", requirement, "--index-url", CPU_INDEX):
        return 0
    print(
        "The CPU build of torch could not be fetched. Install one by hand into .venv "
        f"({requirement}), then run the command again.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
