"""One writer at a time in a run folder.

The lock is held by the operating system on ``.lock`` and belongs to the open file of
one process.  When that process ends, however it ends, the lock is free again: there
is nothing stale to clean up, and no process number that another process could have
taken over.  The file's text only says who holds it, for the message.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from lorakeet.base.errors import RequestError
from lorakeet.base.run_folder import to_disk_error

LOCK = ".lock"


@contextmanager
def hold_run(folder: Path) -> Iterator[None]:
    """Holds a run folder for writing inside a with block.

    Args:
        folder: made when absent.

    Raises:
        RequestError: another process, or another thread of this one, writes there.
        MachineError: the folder cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise to_disk_error(error, path, 0) from error
    with file:
        if not _try_lock(file):
            raise RequestError(
                f"{folder}: {_describe(path)} is writing this run. Wait until it has ended, stop "
                "it, or choose another --run."
            )
        with suppress(OSError):  # who holds it is for a message only; the lock stands without
            _write_holder(file)
        try:
            yield
        finally:
            with suppress(OSError):
                _clear(file)


def is_held(folder: Path) -> bool:
    """Whether a living process writes a run folder at this moment."""
    path = folder / LOCK
    if not path.is_file():
        return False
    try:
        with path.open("r+", encoding="utf-8") as file:
            return not _try_lock(file)
    except PermissionError:
        return False


def _write_holder(file: IO[str]) -> None:
    """Who holds the lock, for the message that another process shows."""
    holder = {
        "process": os.getpid(),
        "machine": platform.node(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    file.seek(0)
    file.truncate()
    file.write(json.dumps(holder))
    file.flush()


def _clear(file: IO[str]) -> None:
    file.seek(0)
    file.truncate()
    file.flush()


def _describe(path: Path) -> str:
    """The holder in words; one that cannot be read is another process."""
    try:
        holder: Any = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['machine']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _try_lock(file: IO[str]) -> bool:
    """Takes the lock of an open file, or returns False when another holds it."""
    try:
        import fcntl
    except ImportError:
        return _try_lock_on_windows(file)
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_lock_on_windows(file: IO[str]) -> bool:
    """The same by a byte beyond the text, as Windows locks bytes against reading too."""
    import msvcrt

    file.seek(1 << 20)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True
