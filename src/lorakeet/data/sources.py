"""Rows of any file, folder or glob, each with the place it came from.

    .jsonl .ndjson .json .csv .tsv .parquet      rows with named fields
    .txt .md .html .pdf                          passages {"text": ...}
    + .gz .xz .bz2 on the text formats           unpacked on the way

Nothing disappears without a word: a row that cannot be read is handed to
``on_drop`` with file, line and reason, and so is a whole file of a folder.
Only a path that gives nothing to read at all is an error.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from pathlib import Path

from lorakeet.base.errors import DataError
from lorakeet.base.records import DroppedRow, Origin, RawRow
from lorakeet.data import documents, rows
from lorakeet.data.documents import Drop, Numbered

Reader = Callable[[Path, Drop], Numbered]
OnDrop = Callable[[DroppedRow], None]

READERS: dict[str, Reader] = {
    ".jsonl": rows.read_jsonl,
    ".ndjson": rows.read_jsonl,
    ".json": rows.read_json,
    ".csv": rows.read_csv,
    ".tsv": rows.read_tsv,
    ".parquet": rows.read_parquet,
    ".txt": documents.read_txt,
    ".md": documents.read_markdown,
    ".markdown": documents.read_markdown,
    ".html": documents.read_html,
    ".htm": documents.read_html,
    ".pdf": documents.read_pdf,
}
_PACKED = (".gz", ".xz", ".bz2")
_PREVIEW_CHARS = 120


def read_rows(path: str, on_drop: OnDrop) -> Iterator[RawRow]:
    """The rows of a file, of every readable file below a folder, or of a glob, in path order.

    Args:
        path: relative paths are taken from the working folder; ``~`` is expanded.
        on_drop: called with each row, page or file that cannot be used.

    Raises:
        DataError: nothing is there, the folder is empty, a single file cannot be
            read at all, or no file of a folder can.

    Guarantees: files in sorted order and rows in file order, so a rerun sees the
    same sequence; a row's origin names its file and its true line.

    Cost: one row in memory, or one file for .json, .html and .pdf.
    """
    files = list_files(path)
    is_single = len(files) == 1 and not Path(path).expanduser().is_dir()
    num_rows, failures = 0, []
    for file in files:
        try:
            for row in _read_file(file, on_drop):
                num_rows += 1
                yield row
        except DataError as error:
            if is_single and num_rows == 0:
                raise
            failures.append(str(error))
            on_drop(_dropped(file, 1, "unreadable-file", str(error), ""))
    if num_rows == 0 and failures and len(failures) == len(files):
        raise DataError(
            f"{path}: none of its {len(files)} files can be read. The first: {failures[0]}"
        )


def list_files(path: str) -> list[Path]:
    """The files a path stands for, sorted; hidden ones and their folders are left out.

    Raises:
        DataError: there is no such file, or the folder or glob holds none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = sorted(found for found in place.rglob("*") if _is_visible_file(found, place))
        if not files:
            raise DataError(
                f"{path}: the folder is empty. It needs at least one data file: {_known_formats()}."
            )
        return files
    if any(char in path for char in "*?["):
        matches = sorted(Path(found) for found in glob.glob(str(place), recursive=True))  # noqa: PTH207
        files = [found for found in matches if found.is_file()]
        if files:
            return files
        raise DataError(f"{path}: no file matches. Check the pattern and the working folder.")
    raise DataError(
        f"{path}: there is no such file or folder (looked in {Path.cwd()}). Check the path."
    )


def _is_visible_file(found: Path, folder: Path) -> bool:
    parts = found.relative_to(folder).parts
    return found.is_file() and not any(part.startswith(".") for part in parts)


def format_of(file: Path) -> str:
    """The ending that decides the reader, with any packing set aside.

    >>> format_of(Path("a/train.JSONL.gz")), format_of(Path("notes.md"))
    ('.jsonl', '.md')
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_file(file: Path, on_drop: OnDrop) -> Iterator[RawRow]:
    kind = format_of(file)
    if kind not in READERS:
        raise DataError(
            f"{file}: the format {kind or '(no ending)'} is not known. "
            f"Convert it to one of {_known_formats()}."
        )
    num_dropped = 0

    def drop(number: int, code: str, reason: str, preview: str) -> None:
        nonlocal num_dropped
        num_dropped += 1
        on_drop(_dropped(file, number, code, reason, preview))

    number = 0
    for number, fields in READERS[kind](file, drop):
        yield RawRow(fields=fields, origin=Origin(path=str(file), line=number))
    if number == 0 and num_dropped == 0:
        raise DataError(f"{file}: the file holds no rows. It needs at least one below any header.")


def _known_formats() -> str:
    return ", ".join(kind for kind in READERS if kind not in (".ndjson", ".markdown", ".htm"))


def _dropped(file: Path, number: int, code: str, reason: str, preview: str) -> DroppedRow:
    shown = preview.encode("utf-8", "replace").decode()[:_PREVIEW_CHARS]
    return DroppedRow(
        origin=Origin(path=str(file), line=number), code=code, reason=reason, preview=shown
    )
