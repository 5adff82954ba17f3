"""Putting a finished folder in place whole, and never over what is not ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lorakeet.base.errors import MachineError, RequestError
from lorakeet.base.run_folder import to_disk_error

LINEAGE = "lorakeet.json"
_MARKS = ("adapter_config.json", LINEAGE, "config.json")


def check_replaceable(folder: Path) -> None:
    """Only an empty folder, or one that holds an adapter or model, may be replaced.

    Raises:
        RequestError: the place holds something else.
    """
    if folder.is_dir() and not (
        any((folder / mark).is_file() for mark in _MARKS) or not any(folder.iterdir())
    ):
        raise RequestError(f"{folder}: holds other files. Choose a new or empty folder.")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: is a file. Choose a new or empty folder.")


def publish_folder(beside: Path, folder: Path) -> None:
    """Puts a finished folder in place; the older one goes only when the new one stands."""
    for path in (*beside.rglob("*"), beside):
        _sync(path)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def to_write_error(error: Exception, folder: Path, needed_bytes: int) -> MachineError:
    """A failed write as an error for people; safetensors reports a full disk as its own."""
    if isinstance(error, OSError):
        return to_disk_error(error, folder, needed_bytes)
    return MachineError(f"{folder}: cannot be written ({error}); it needs {needed_bytes:,} bytes.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
