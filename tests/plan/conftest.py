"""A machine's surroundings that tests can set: the driver's tool and installed packages."""

import os
import sys

import pytest


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Puts a tool named nvidia-smi on the PATH that says what a test wants."""
    folder = tmp_path / "bin"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(output, code=0):
        folder.mkdir(exist_ok=True)
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {code}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Makes these packages, and no others, look installed."""
    folder = tmp_path / "site"

    def install(**versions):
        for name, version in versions.items():
            info = folder / f"{name}-{version}.dist-info"
            info.mkdir(parents=True)
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            (info / "METADATA").write_text(text)
        monkeypatch.setattr(sys, "path", [str(folder)])

    return install
