"""The folder of one run: names, atomic writes and content hashes.

Stages meet through files here and nowhere else, so a stage can be rerun,
inspected or replaced alone.  A file appears whole or not at all: it is written
beside its place, flushed to the disk and renamed, which POSIX makes atomic.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lorakeet.base.errors import FileFormatError, MachineError


@dataclass(frozen=True)
class RunFolder:
    """Names of everything a run leaves behind.

    >>> RunFolder(Path("runs/law")).adapter.as_posix()
    'runs/law/adapter'
    """

    path: Path

    @property
    def recipe(self) -> Path:
        """What was asked."""
        return self.path / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        """Every value that was decided, versions and content hashes."""
        return self.path / "resolved.yaml"

    @property
    def data(self) -> Path:
        """Shards, the data report and the dropped rows."""
        return self.path / "data"

    @property
    def data_report(self) -> Path:
        """Counts and warnings of the data stage."""
        return self.data / "report.json"

    @property
    def dropped(self) -> Path:
        """Every row that was not used whole, with file, line and reason."""
        return self.data / "dropped.jsonl"

    @property
    def plan(self) -> Path:
        """Predicted memory, speed and cost."""
        return self.path / "plan.json"

    @property
    def widths(self) -> Path:
        """Each layer's bits in a base of mixed widths, and what they cost."""
        return self.path / "widths.json"

    @property
    def events(self) -> Path:
        """Every step, evaluation, alarm and sample answer, one JSON a line."""
        return self.path / "events.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's log folder."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """``step-000200`` and its like."""
        return self.path / "checkpoints"

    @property
    def frozen_states(self) -> Path:
        """What frozen layers answered, kept from epoch to epoch; may be removed at any time."""
        return self.path / "cache" / "frozen"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's format (or, after full training, ``model``)."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model after full fine-tuning."""
        return self.path / "model"

    @property
    def merged(self) -> Path:
        """Base and adapter in one model."""
        return self.path / "merged"

    @property
    def proofs(self) -> Path:
        """What was verified, with figures."""
        return self.path / "proofs"

    @property
    def evaluation(self) -> Path:
        """Scores of the base and of the tuned model."""
        return self.path / "evaluation.json"

    @property
    def pictures(self) -> Path:
        """Plots as PNG files."""
        return self.path / "pictures"

    @property
    def report(self) -> Path:
        """One self-contained page about the run."""
        return self.path / "report.html"


def write_text(path: Path, text: str) -> None:
    """Puts a file in place whole or not at all.

    Raises:
        MachineError: the disk is full or the folder cannot be written; an older
            file of that name is untouched.
    """
    with open_to_replace(path, needed_bytes=len(text.encode())) as file:
        file.write(text)


@contextmanager
def open_to_replace(path: Path, *, needed_bytes: int = 0) -> Iterator[TextIO]:
    """A UTF-8 file to write, which takes its place whole when it is closed without an error.

    Args:
        needed_bytes: for the message of a full disk, where it is known.

    Raises:
        MachineError: as ``write_text``.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise to_disk_error(error, path, needed_bytes) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def remove_leftovers(run: RunFolder) -> None:
    """Removes half-written files that a killed process left; call it as the only writer.

    Nothing finished is ever named so: files and folders are written as ``.<name>.tmp`` and
    an older one steps aside as ``.<name>.old``.
    """
    for folder in (run.path, run.data, run.proofs):
        for path in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def to_disk_error(error: OSError, path: Path, needed_bytes: int) -> MachineError:
    """The message of a failed write: what was in the way and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(
            f"{path}: the disk is full; this file needs {needed_bytes:,} bytes. "
            "Free some space and start the command again: finished stages are kept."
        )
    if error.errno in (errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.EIO):
        return MachineError(
            f"{path}: its folder is gone or its disk does not answer ({error.strerror}). Bring it "
            "back, and 'lorakeet resume' goes on from the newest checkpoint."
        )
    return MachineError(
        f"{path}: cannot be written ({error.strerror}). Choose a folder that you may write to."
    )


def write_json(path: Path, value: Any) -> None:
    """A value as indented UTF-8 JSON, put in place atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileFormatError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: there is no such file. Check the folder's name.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(
            f"{path}: this is not JSON ({error}). The file is damaged; take it from a copy."
        ) from error


def sha256_file(path: Path) -> str:
    """The hex digest of a file's bytes, read in pieces of 1 MiB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path) -> str:
    """One digest over the names and contents of all files below a folder.

    Hidden files are left out; the order of the file system does not matter.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            digest.update(f"{name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()
