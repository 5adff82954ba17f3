"""The diary of a run: one JSON object a line, only ever appended.

Everything that watches a run (console, TensorBoard, alarms, report, studio)
reads these lines, so a live, a finished and a crashed run look the same.
Whoever does the work takes ``emit(kind, **fields)`` as an argument and does not
know who listens.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, Protocol

from lorakeet.base.errors import RequestError
from lorakeet.base.run_folder import to_disk_error

KINDS = frozenset(
    "run_started stage_started stage_finished data_report plan path progress step evaluation "
    "sample_answers checkpoint alarm early_stop ranks proof run_finished run_interrupted "
    "run_failed first_batch factors frozen_cache frozen_states remote_code".split()
)


class Emit(Protocol):
    """Takes an event: its kind and its fields."""

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Record or show one event."""


def ignore_events(kind: str, /, **fields: Any) -> None:
    """An ``Emit`` for work that keeps no diary."""


class EventLog:
    """Appends events to a file; each call is one write of one line.

    Args:
        path: ``events.jsonl``; made with its folder when absent.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            _end_half_line(path)
        except OSError as error:
            raise to_disk_error(error, path, 0) from error
        self.path = path

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Writes one line: the time in Unix seconds, the kind and the fields.

        NaN and infinity become null, as JSON has no such numbers.

        Raises:
            RequestError: the kind is not in ``KINDS``.
            MachineError: the disk is full, or the folder is gone.
        """
        if kind not in KINDS:
            raise RequestError(
                f"'{kind}' is no kind of event. Known are {', '.join(sorted(KINDS))}."
            )
        event = {"time": round(time.time(), 3), "kind": kind, **_to_json(fields)}
        line = json.dumps(event, ensure_ascii=False) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8", opener=_open_existing) as file:
                file.write(line)
        except OSError as error:
            raise to_disk_error(error, self.path, len(line.encode())) from error


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a file, in order; none when there is no file.

    A last line that a crash left half-written is passed over.
    """
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and "kind" in event:
            events.append(event)
    return events


def _open_existing(path: str, flags: int) -> int:
    """Opens a file that must be there: a folder that vanished is not made anew elsewhere."""
    return os.open(path, flags & ~os.O_CREAT)


def _end_half_line(path: Path) -> None:
    """A new line after a half-written one, so that the next event stands alone."""
    if path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _to_json(value: Any) -> Any:
    """A value whose floats are all finite, for strict JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value
