"""The registry: one row for each run, adapter and merged model below a folder.

    runs/registry.sqlite        beside the runs; LORAKEET_REGISTRY names another file
    entries(folder, content)    the folder, relative to the registry where it lies below it

A row only repeats what the folder itself tells, so a lost or damaged registry is built
again from the folders and no run depends on it.  SQLite in WAL mode lets several
processes write; a writer that is killed leaves either the old row or the new one.

Source: sqlite.org/wal.html.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lorakeet.base.errors import FileFormatError

NAME = "registry.sqlite"
VARIABLE = "LORAKEET_REGISTRY"
VERSION = 1
BUSY_S = 30.0  # a write takes milliseconds; a busy machine may let a writer wait for seconds


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run, adapter or merged model.

    Args:
        folder: where it lies.
        kind: ``run``, ``adapter`` or ``model``.
        state: ``running``, ``finished``, ``interrupted`` or ``failed`` as it was written down;
            a reader who finds a running one unlocked calls it ``stopped``.
        created, finished: Unix seconds; None where it is not known.
        settings: the recipe, dotted name -> value.
        hashes: SHA-256 of base, data and results by name.
        scores: figures by name.
        parents: what it was made from, each with ``folder`` and, where known, ``sha256``.
        problem: why it failed, or an empty text.
    """

    folder: Path
    kind: str
    state: str
    base: str = ""
    method: str = ""
    steps: int = 0
    created: float | None = None
    finished: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    parents: tuple[dict[str, Any], ...] = ()
    problem: str = ""

    @property
    def name(self) -> str:
        """The folder's own name, which people type."""
        return self.folder.name

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, **asdict(self), "folder": str(self.folder)}


class Registry:
    """The rows of one registry file; each call opens the file and closes it again.

    Args:
        path: made at the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, entry: Entry) -> None:
        """Writes a row, over an older one of the same folder.

        Raises:
            FileFormatError: the file is no registry, or cannot be written.
        """
        content = {k: v for k, v in entry.to_dict().items() if k not in ("folder", "name")}
        row = (self._to_key(entry.folder), json.dumps(content, ensure_ascii=False), time.time())
        with self._open() as database, database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", row)

    def remove(self, folder: Path) -> bool:
        """Takes a row away; False when there was none."""
        with self._open() as database, database:
            done = database.execute("DELETE FROM entries WHERE folder = ?", (self._to_key(folder),))
            return done.rowcount > 0

    def read(self) -> list[Entry]:
        """All rows, the oldest first; none when there is no file.

        Raises:
            FileFormatError: the file is no registry, or damaged.
        """
        if not self.path.is_file():
            return []
        with self._open() as database:
            rows = database.execute("SELECT folder, content FROM entries").fetchall()
        try:
            entries = [self._to_entry(key, json.loads(content)) for key, content in rows]
        except (ValueError, TypeError, AttributeError) as error:
            raise self._to_error(error) from error
        return sorted(entries, key=lambda entry: (entry.created or 0, str(entry.folder)))

    def _to_key(self, folder: Path) -> str:
        """The folder as it is stored, so that registry and runs can move together."""
        whole, root = folder.resolve(), self.path.parent.resolve()
        return whole.relative_to(root).as_posix() if whole.is_relative_to(root) else str(whole)

    def _to_entry(self, key: str, content: dict[str, Any]) -> Entry:
        known = {each.name for each in fields(Entry)} - {"folder"}
        values = {name: value for name, value in content.items() if name in known}
        values["parents"] = tuple(values.get("parents") or ())
        return Entry(folder=self.path.parent / key, **values)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection that waits for other writers; SQLite's errors become ours."""
        try:
            if not self.path.is_file():
                _create(self.path)
            with closing(sqlite3.connect(self.path, BUSY_S, isolation_level=None)) as database:
                (version,) = database.execute("PRAGMA user_version").fetchone()
                if version != VERSION:
                    raise sqlite3.DatabaseError(f"version {version}, needed is {VERSION}")
                yield database
        except (sqlite3.Error, OSError) as error:
            raise self._to_error(error) from error

    def _to_error(self, error: Exception) -> FileFormatError:
        return FileFormatError(
            f"{self.path}: the registry cannot be used ({error}). No run needs it; "
            f"'lorakeet runs scan {self.path.parent}' builds it again from the run folders."
        )


def registry_beside(folder: Path) -> Registry:
    """The registry that a run folder belongs to: beside it, or where LORAKEET_REGISTRY says."""
    return registry_in(folder.absolute().parent)


def registry_in(root: Path) -> Registry:
    """The registry of a folder of runs."""
    asked = os.environ.get(VARIABLE)
    return Registry(Path(asked) if asked else root / NAME)


def _create(path: Path) -> None:
    """An empty registry, put in place whole; of several processes one wins and all go on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(beside, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(
                "CREATE TABLE entries (folder TEXT PRIMARY KEY, content TEXT, written REAL)"
            )
            database.execute(f"PRAGMA user_version = {VERSION}")
        try:
            os.link(beside, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            if not path.exists():
                beside.replace(path)
    finally:
        for ending in ("", "-wal", "-shm"):
            beside.with_name(beside.name + ending).unlink(missing_ok=True)
