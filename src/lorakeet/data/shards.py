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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorakeet.base.errors import FileFormatError
from lorakeet.base.records import EncodedSample, Origin
from lorakeet.base.run_folder import read_json, sha256_file, to_disk_error, write_json

FORMAT = 2
_ROWS_AT_ONCE = 1024
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


class ShardWriter:
    """Takes samples one by one; the folder appears when the writer is closed without an error.

    Use it as a context manager.

    Raises:
        MachineError: the disk is full; the older folder is gone, no new one appears.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._beside = folder.with_name(f".{folder.name}.tmp")
        self._paths: dict[str, int] = {}
        self._waiting: list[tuple[EncodedSample, int]] = []
        self._num_tokens = 0
        self.num_rows = 0
        with self._on_disk():
            shutil.rmtree(self._beside, ignore_errors=True)
            self._beside.mkdir(parents=True)
            self._files = {name: (self._beside / f"{name}.bin").open("wb") for name in _TYPES}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._on_disk():
            if kind is None:
                self._flush()
            for file in self._files.values():
                file.close()
            if kind is not None:
                shutil.rmtree(self._beside, ignore_errors=True)
                return
            write_json(self._beside / "paths.json", list(self._paths))
            hashes = {file.name: sha256_file(file) for file in sorted(self._beside.iterdir())}
            counts = {"format": FORMAT, "rows": self.num_rows, "tokens": self._num_tokens}
            write_json(self._beside / "index.json", counts | {"sha256": hashes})
            shutil.rmtree(self.folder, ignore_errors=True)
            self._beside.replace(self.folder)

    def add(self, sample: EncodedSample, source: int) -> None:
        """Appends a sample of a source."""
        self._waiting.append((sample, source))
        self.num_rows += 1
        if len(self._waiting) == _ROWS_AT_ONCE:
            with self._on_disk():
                self._flush()

    def to_index(self) -> ShardIndex:
        """What has been written."""
        return ShardIndex(num_rows=self.num_rows, num_tokens=self._num_tokens)

    def _flush(self) -> None:
        """Writes the waiting samples, a column at a time."""
        samples = [sample for sample, _ in self._waiting]
        if not samples:
            return
        number_of = [
            self._paths.setdefault(sample.origin.path, len(self._paths)) for sample in samples
        ]
        ends = np.cumsum([len(sample.ids) for sample in samples]) + self._num_tokens
        self._num_tokens = int(ends[-1])
        columns = {
            "ids": np.concatenate([sample.ids for sample in samples]),
            "mask": np.concatenate([sample.mask for sample in samples]),
            "ends": ends,
            "labels": [sample.label for sample in samples],
            "sources": [source for _, source in self._waiting],
            "lines": [sample.origin.line for sample in samples],
            "path_numbers": number_of,
        }
        for name, kind in _TYPES.items():
            self._files[name].write(np.asarray(columns[name], dtype=kind).tobytes())
        self._waiting.clear()

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Turns the system's error into one with a remedy, and leaves nothing half written."""
        try:
            yield
        except OSError as error:
            shutil.rmtree(self._beside, ignore_errors=True)
            raise to_disk_error(error, self.folder, 0) from error


def write_shards(samples: Iterable[tuple[EncodedSample, int]], folder: Path) -> ShardIndex:
    """Streams samples with the number of their source to a folder, replacing what was there.

    Raises:
        MachineError: the disk is full; the older folder is gone, no new one appears.
    """
    with ShardWriter(folder) as writer:
        for sample, source in samples:
            writer.add(sample, source)
    return writer.to_index()


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
    return np.asarray(np.memmap(path, dtype=kind, mode="r"))  # plain arrays are cut faster
