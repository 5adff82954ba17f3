"""Runs and adapters on record: list, show, compare, remove, and find them again on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakeet.api.describe import describe, is_result, is_run
from lorakeet.base.errors import DataError, FileFormatError, MachineError, RequestError
from lorakeet.base.events import Emit
from lorakeet.base.registry import Entry, registry_beside, registry_in
from lorakeet.base.run_lock import hold_run, is_held

STOPPED, GONE = "stopped", "gone"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two or more runs side by side.

    Args:
        settings: those that differ, dotted name -> one value a run; None where it has none.
        scores: every score that one of them has, likewise.
        hashes: name -> one digest a run, for bases, data and results that differ.
    """

    entries: tuple[Entry, ...]
    settings: Mapping[str, tuple[Any, ...]]
    scores: Mapping[str, tuple[Any, ...]]
    hashes: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """What a scan found: the rows it wrote, and folders that cannot be read, with the reason."""

    entries: tuple[Entry, ...]
    problems: tuple[str, ...]


def record(folder: Path, emit: Emit, *, owner: Path | None = None) -> None:
    """Writes down what a folder is at this moment; a registry that fails is an alarm, no error.

    Args:
        owner: the run whose registry gets the row, for results that lie elsewhere.

    Runs inside a hidden folder are somebody's scratch work and stay off the record.
    """
    place = folder.absolute()
    if place.parent.name.startswith("."):
        return
    try:
        registry_beside(owner or place).put(describe(place))
    except (DataError, OSError, KeyError, TypeError, ValueError) as error:
        with suppress(MachineError):  # a full disk, which the run itself has met or will meet
            emit("alarm", code="registry", step=0, message=f"{error} The run itself goes on.")


def list_runs(root: str | Path) -> list[Entry]:
    """Every row below a folder of runs, the oldest first, with the state that it has now.

    Raises:
        FileFormatError: the registry is damaged.
        RequestError: there is no registry.
    """
    registry = registry_in(Path(root))
    if not registry.path.is_file():
        raise RequestError(
            f"{registry.path}: there is no registry. It is written by the first run below {root}; "
            f"'lorakeet runs scan {root}' makes one of the runs that are there."
        )
    return [_as_it_is(entry) for entry in registry.read()]


def find_run(name: str | Path, root: str | Path) -> Entry:
    """The row of a name or of a folder.

    Raises:
        RequestError: it is not there, or several have this name.
    """
    place = Path(name)
    entries = list_runs(root if not place.is_dir() or place.name == str(name) else place.parent)
    found = [e for e in entries if place.is_dir() and _is_same(e.folder, place)]
    found = found or [entry for entry in entries if entry.name == str(name)]
    if len(found) == 1:
        return _with_parents_named(found[0], entries)
    if found:
        raise RequestError(
            f"{name}: {len(found)} entries have this name: "
            f"{', '.join(str(each.folder) for each in found)}. Give the folder."
        )
    known = ", ".join(entry.name for entry in entries[-8:]) or "none"
    raise RequestError(f"{name}: no such run in {root}. Known are {known}; 'lorakeet runs list'.")


def compare_runs(names: Sequence[str | Path], root: str | Path) -> Compared:
    """Settings that differ, all scores, and hashes that differ.

    Raises:
        RequestError: fewer than two runs are named, or one is not there.
    """
    if len(names) < 2:
        raise RequestError(f"{len(names)} runs are named; a comparison needs at least two.")
    entries = tuple(find_run(name, root) for name in names)
    settings = _pair_up([e.settings | {"method": e.method, "base": e.base} for e in entries])
    hashes = _pair_up([entry.hashes for entry in entries])
    return Compared(
        entries=entries, scores=_pair_up([entry.scores for entry in entries]),
        settings={k: row for k, row in settings.items() if any(v != row[0] for v in row)},
        hashes={k: row for k, row in hashes.items() if any(v != row[0] for v in row)},
    )  # fmt: skip


def remove_run(name: str | Path, root: str | Path) -> Entry:
    """Removes a run's folder and its row.

    The folder is renamed first, so that nothing half-removed ever bears the run's name.

    Raises:
        RequestError: it is being written, or the folder holds something else.
    """
    entry = find_run(name, root)
    folder = entry.folder
    if folder.is_dir():
        if not (is_run(folder) or is_result(folder)):
            raise RequestError(
                f"{folder}: holds neither a run nor an adapter, so it is not removed. Remove it by "
                "hand, and then this row."
            )
        if entry.kind == "run":
            with hold_run(folder):
                hidden = _hide(folder)
        else:
            hidden = _hide(folder)
        shutil.rmtree(hidden, ignore_errors=True)
    registry_in(_root_of(name, root)).remove(folder)
    return entry


def scan_runs(root: str | Path) -> Scanned:
    """Builds the rows of everything at or below a folder again; rows of lost folders go.

    A damaged registry is put aside as ``registry.sqlite.damaged``.

    Raises:
        RequestError: there is no such folder.
    """
    place = Path(root)
    if not place.is_dir():
        raise RequestError(f"{place}: there is no such folder. Name one that holds runs.")
    registry = registry_in(place)
    try:
        older = registry.read()
    except FileFormatError:
        _put_aside(registry.path)
        older = []
    entries, problems = [], []
    for folder in _walk(place):
        try:
            entry = describe(folder)
        except (DataError, OSError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{folder}: {error}")
            continue
        registry.put(entry)
        entries.append(_as_it_is(entry))
    for entry in older:
        if not entry.folder.is_dir():
            registry.remove(entry.folder)
    return Scanned(entries=tuple(entries), problems=tuple(problems))


def _as_it_is(entry: Entry) -> Entry:
    """The row with the state of this moment: gone, or no longer running."""
    if not entry.folder.is_dir():
        return replace(entry, state=GONE)
    if entry.state == "running" and not is_held(entry.folder):
        return replace(entry, state=STOPPED)
    return entry


def _with_parents_named(entry: Entry, entries: Sequence[Entry]) -> Entry:
    """The row with the folder of each parent that is known by its hash alone."""
    homes = {digest: each for each in entries for digest in each.hashes.values()}
    parents = tuple(
        {**p, "folder": str(homes[p["sha256"]].folder)}
        if not p.get("folder") and p.get("sha256") in homes
        else p
        for p in entry.parents
    )
    return replace(entry, parents=parents)


def _is_same(one: Path, two: Path) -> bool:
    return one.resolve() == two.resolve()


def _root_of(name: str | Path, root: str | Path) -> Path:
    """Where ``find_run`` looked."""
    place = Path(name)
    return place.parent if place.is_dir() and place.name != str(name) else Path(root)


def _pair_up(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """name -> one value a row, in the order in which the names first come."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: tuple(row.get(name) for row in rows) for name in names}


def _hide(folder: Path) -> Path:
    """Renames a folder out of sight."""
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    return folder.rename(hidden)


def _put_aside(path: Path) -> None:
    """A damaged registry with its journal, kept for a look."""
    for ending in ("", "-wal", "-shm"):
        file = path.with_name(path.name + ending)
        if file.exists():
            file.replace(path.with_name(f"{path.name}.damaged{ending}"))


def _walk(root: Path) -> list[Path]:
    """Runs, and adapters and models outside of runs, in the order of their names."""
    found = []
    for place, inner, _ in os.walk(root):
        folder = Path(place)
        inner[:] = [name for name in inner if not name.startswith(".")]
        if is_run(folder) or is_result(folder):
            found.append(folder)
            inner.clear()
    return sorted(found)
