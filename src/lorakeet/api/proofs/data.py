"""``verify data``: no row is lost without a word, and the sources are the same bytes.

    read = trained + validated + dropped        row by row, by file and line

The sources are read again from the start, so the report of the data stage is
compared with the files and not with itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakeet.api.resolve import read_installed_versions, recipe_of_run
from lorakeet.base.errors import DataError, FileFormatError
from lorakeet.base.proofs import Proof, find_excess, write_proof
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import DroppedRow
from lorakeet.base.run_folder import RunFolder, read_json, sha256_file

SHOWN = 5
STILL_TRAINED = "cut"  # listed in dropped.jsonl, and trained without its end

Row = tuple[str, int]


def verify_data(run: str | Path) -> Proof:
    """Reads the sources again and looks for every row in the shards or in ``dropped.jsonl``.

    Raises:
        FileFormatError: the folder holds no run, or its data stage never ended.
        DataError: a source is gone.
    """
    from lorakeet.data.shards import ShardReader

    folder = RunFolder(Path(run))
    recipe = recipe_of_run(folder)
    report = read_json(folder.data_report)
    readers = {name: ShardReader(folder.data / name) for name in ("train", "validation")}
    used = {name: Counter(reader.origins()) for name, reader in readers.items()}
    dropped = Counter(_read_dropped(folder.dropped))
    read = _read_sources(recipe)
    kept = used["train"] + used["validation"] + dropped
    missing, extra = read - kept, kept - read
    changed = _changed_files(report)
    figures = {
        "num_unaccounted_rows": missing.total() + extra.total(),
        "num_changed_sources": len(changed),
        "num_read": read.total(),
        "num_trained": used["train"].total(),
        "num_validation": used["validation"].total(),
        "num_dropped": dropped.total(),
        "num_sources": len(report["fingerprint"]["files"]),
    }
    limits = {"num_unaccounted_rows": 0, "num_changed_sources": 0}
    places = [
        f"{word}: {_some(rows)}."
        for word, rows in (
            ("in the sources and nowhere else", missing),
            ("not in the sources", extra),
        )
        if rows
    ]
    proof = Proof(
        name="data",
        compared="every row of the sources with the shards and dropped.jsonl, by file and line",
        figures=figures, tolerances=limits,
        problems=(*find_excess(figures, limits), *places, *changed),
        versions=read_installed_versions(),
    )  # fmt: skip
    write_proof(folder, proof)
    return proof


def find_changed_sources(hashes: dict[str, str]) -> tuple[str, ...]:
    """A sentence for each file that is gone or has other bytes than its recorded SHA-256."""
    problems = []
    for name, digest in hashes.items():
        path = Path(name)
        if not path.is_file():
            problems.append(f"{name}: the file is gone.")
        elif sha256_file(path) != digest:
            problems.append(f"{name}: its bytes are not those that were trained on.")
    return tuple(problems)


def _changed_files(report: dict[str, Any]) -> tuple[str, ...]:
    files = (report.get("fingerprint") or {}).get("files")
    if not isinstance(files, dict):
        raise FileFormatError(
            "data/report.json lists no hashes of its sources. Build the data again: remove the "
            "run's folder 'data' and resume."
        )
    return find_changed_sources(files)


def _read_sources(recipe: Recipe) -> Counter[Row]:
    """Every row of every source, readable or not, by file and line."""
    from lorakeet.data.prepare import source_paths
    from lorakeet.data.sources import read_rows

    seen: Counter[Row] = Counter()

    def note(row: DroppedRow) -> None:
        seen[row.origin.path, row.origin.line] += 1

    for path in source_paths(recipe):
        for row in read_rows(path, note):
            seen[row.origin.path, row.origin.line] += 1
    return seen


def _read_dropped(path: Path) -> Iterator[Row]:
    """Rows of ``dropped.jsonl`` that nothing was trained on."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines):
            if row["code"] != STILL_TRAINED:
                yield row["file"], row["line"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise DataError(
            f"{path}: the list of dropped rows cannot be read ({error}). Build the data again."
        ) from error


def _some(rows: Counter[Row]) -> str:
    shown = ", ".join(f"{path} line {line}" for path, line in sorted(rows)[:SHOWN])
    return shown + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
