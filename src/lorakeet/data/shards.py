"""Encoded samples on disk, opened by memory map: memory does not grow with rows.

ids.bin      int32 [tokens]     all rows, one after the other
mask.bin     uint8 [tokens]
ends.bin     int64 [rows]       where each row ends in the two above
labels.bin   int32 [rows]
sources.bin  int32 [rows]       which entry of data.train
lines.bin    int64 [rows]       with paths.json: where each row came from
index.json   format version, counts and SHA-256 of each file, written last
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorakeet.base.errors import FileFormatError
from lorakeet.base.records import EncodedSample, Origin
from lorakeet.base.run_folder import read_json, sha256_file, to_disk_error, write_json

FORMAT = 2
_TYPES = {
    "ids": np.int32,
    "mask": np.uint8,
    "ends": np.int64,
    "labels": np.int32,
    "sources": np.int32,
    "lines": np.int64,
    "path_numbers": np.int32,
}


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What was written."""

    num_rows: int
    num_tokens: int


def write_shards(samples: Iterable[tuple[EncodedSample, int]], folder: Path) -> ShardIndex:
    """Streams samples with the number of their source to a folder, replacing what was there.

    Raises:
        MachineError: the disk is full; the older folder is gone, no new one appears.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        index = _write_files(samples, beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise to_disk_error(error, folder, 0) from error
    return index


def _write_files(samples: Iterable[tuple[EncodedSample, int]], folder: Path) -> ShardIndex:
    """One file a column; the index last."""
    paths: dict[str, int] = {}
    files = {name: (folder / f"{name}.bin").open("wb") for name in _TYPES}
    rows = tokens = 0
    try:
        for sample, source in samples:
            rows, tokens = rows + 1, tokens + len(sample.ids)
            number = paths.setdefault(sample.origin.path, len(paths))
            values = (sample.ids, sample.mask, tokens, sample.label, source,
                      sample.origin.line, number)  # fmt: skip
            for (name, kind), value in zip(_TYPES.items(), values, strict=True):
                files[name].write(np.asarray(value, dtype=kind).tobytes())
    finally:
        for file in files.values():
            file.close()
    write_json(folder / "paths.json", list(paths))
    hashes = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    content = {"format": FORMAT, "rows": rows, "tokens": tokens, "sha256": hashes}
    write_json(folder / "index.json", content)
    return ShardIndex(num_rows=rows, num_tokens=tokens)


class ShardReader:
    """Rows of a folder of shards by number, each read when asked for.

    Raises:
        FileFormatError: the folder is missing, incomplete, of another format, or its bytes are
            not those that were written.

    Cost: every byte is read once, for the hashes; about a second for 300 million tokens.
    """

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / "index.json")
        found = index.get("format") if isinstance(index, dict) else None
        if found != FORMAT:
            raise FileFormatError(
                f"{folder}: shards of format {found}, needed {FORMAT}. Remove the "
                "folder and build the data again."
            )
        _verify(folder, index.get("sha256"))
        self.folder = folder
        self._paths = read_json(folder / "paths.json")
        columns = {name: _open(folder / f"{name}.bin", kind) for name, kind in _TYPES.items()}
        sizes = {name: len(column) for name, column in columns.items()}
        wanted = dict.fromkeys(_TYPES, index["rows"]) | dict.fromkeys(
            ("ids", "mask"), index["tokens"]
        )
        if sizes != wanted:
            raise FileFormatError(
                f"{folder}: the shards are incomplete. Remove the folder and build the data again."
            )
        self._columns = columns
        self.lengths = np.diff(columns["ends"], prepend=0)
        self.source_of = np.asarray(columns["sources"])
        self.labels = np.asarray(columns["labels"])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> EncodedSample:
        column = self._columns
        end = int(column["ends"][row])
        start = end - int(self.lengths[row])
        return EncodedSample(
            ids=np.asarray(column["ids"][start:end]),
            mask=np.asarray(column["mask"][start:end], dtype=bool),
            label=int(column["labels"][row]),
            origin=Origin(
                path=self._paths[column["path_numbers"][row]], line=int(column["lines"][row])
            ),
        )

    def origins(self) -> Iterator[tuple[str, int]]:
        """File and line of every row, in the order of the rows."""
        column = self._columns
        for number, line in zip(column["path_numbers"], column["lines"], strict=True):
            yield self._paths[number], int(line)


def _verify(folder: Path, hashes: object) -> None:
    """Refuses files whose bytes are not those that the index lists."""
    known = hashes if isinstance(hashes, dict) else {}
    needed = {f"{name}.bin" for name in _TYPES} | {"paths.json"}
    wrong = sorted(
        name for name in needed
        if not (folder / name).is_file() or known.get(name) != sha256_file(folder / name)
    )  # fmt: skip
    if wrong:
        raise FileFormatError(
            f"{folder / wrong[0]}: not the bytes that were written, or gone"
            + (f" (and {len(wrong) - 1} more files)" if wrong[1:] else "")
            + ". Remove the folder and build the data again; 'lorakeet resume' does so by itself."
        )


def _open(path: Path, kind: type) -> np.ndarray:
    """A column by memory map; an empty file is an empty column."""
    if not path.is_file():
        raise FileFormatError(f"{path}: missing. Remove the folder and build the data again.")
    if not path.stat().st_size:
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")
