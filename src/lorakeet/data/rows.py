"""Readers of row formats: JSON Lines, JSON, CSV, TSV and Parquet.

Each reader is a generator of ``(number, fields)``: the line in the file for
JSON Lines and CSV, the row's position for JSON and Parquet, both from 1.  A bad
row is reported through ``drop`` and the reader goes on; JSON Lines, CSV and
Parquet are read in pieces, JSON as a whole, as its format has no pieces.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from lorakeet.base.errors import DataError, MachineError
from lorakeet.data.documents import Drop, Numbered
from lorakeet.data.encodings import find_bad_byte, iterate_lines, read_text

_BATCH_ROWS = 1024
_DECODER = json.JSONDecoder()
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is below one document


def read_jsonl(path: Path, drop: Drop) -> Numbered:
    """Rows of JSON Lines; blank lines are passed over."""
    for number, line in iterate_lines(path):
        if not line.strip():
            continue
        if number == 1 and line.strip() == "[":  # a JSON list under another name
            yield from read_json(path, drop)
            return
        row = _parse_line(line, number, drop)
        if row is not None:
            yield number, row


def _parse_line(line: str, number: int, drop: Drop) -> dict[str, Any] | None:
    bad = find_bad_byte(line)
    if bad:
        drop(number, "bad-encoding", _encoding_reason(bad), line)
        return None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        drop(number, "bad-json", _json_reason(error, line), line)
        return None
    return _as_fields(row, number, drop)


def _encoding_reason(byte: str) -> str:
    return (
        f"the byte {byte} does not fit the file's encoding, so the text is damaged. "
        "Save the row as UTF-8."
    )


def _json_reason(error: json.JSONDecodeError, line: str) -> str:
    what = "the row breaks off" if error.pos >= len(line.rstrip()) else "the row is not valid JSON"
    return f"{what} ({error.msg} at character {error.pos + 1}). Complete or remove it."


def _as_fields(row: Any, number: int, drop: Drop) -> dict[str, Any] | None:
    if isinstance(row, dict):
        return row
    drop(
        number,
        "not-an-object",
        f"the row is a JSON {_json_kind(row)}, but a row needs named fields, as in "
        '{"question": "...", "answer": "..."}. Give its values names.',
        str(row),
    )
    return None


def _json_kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def read_json(path: Path, drop: Drop) -> Numbered:
    """Rows of a JSON list, or of the list under "data" in an object.

    A file that breaks off keeps the rows before the break.  JSON Lines under the
    name .json is read as what it is.

    Raises:
        DataError: the file is neither a list of rows nor holds one.
    """
    text = read_text(path)
    try:
        content = orjson.loads(text)
    except ValueError:  # damaged, or not one value: read what can be read
        yield from _read_damaged_json(path, text, drop)
        return
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        found = f"fields {_name_list(content)}" if isinstance(content, dict) else "a single value"
        raise DataError(
            f"{path}: a JSON file with {found} and no list of rows. It needs a list of objects, "
            'or an object with such a list under "data".'
        )
    for number, row in enumerate(rows, start=1):
        fields = _as_fields(row, number, drop)
        if fields is not None:
            yield number, fields


def _name_list(fields: dict[str, Any]) -> str:
    names = [repr(name) for name in fields]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read_damaged_json(path: Path, text: str, drop: Drop) -> Numbered:
    start = text.lstrip("\ufeff \t\r\n")
    if start.startswith("{"):
        first = start.split("\n", 1)[0]
        if _is_object(first):
            yield from read_jsonl(path, drop)
            return
    if not start.startswith("["):
        raise DataError(
            f"{path}: this is not JSON; it begins with {start[:30]!r}. It needs a list of "
            "objects. Check how the file was written."
        )
    for number, row in _scan_list(text, text.index("[") + 1, drop):
        bad = find_bad_byte(json.dumps(row, ensure_ascii=False))
        if bad:
            drop(number, "bad-encoding", _encoding_reason(bad), str(row))
            continue
        fields = _as_fields(row, number, drop)
        if fields is not None:
            yield number, fields


def _is_object(line: str) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except ValueError:
        return False


def _scan_list(text: str, position: int, drop: Drop) -> Iterator[tuple[int, Any]]:
    """The values of a JSON list up to the first that cannot be read, which is reported."""
    number = 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if text[position : position + 1] == "]":
            return
        number += 1
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            line = text.count("\n", 0, error.pos) + 1
            drop(
                number,
                "bad-json",
                f"the file cannot be read beyond row {number} (line {line}: {error.msg}); the "
                f"{number - 1} rows before it are used. Mend the file there.",
                text[position : position + 120],
            )
            return
        yield number, value


def read_csv(path: Path, drop: Drop) -> Numbered:
    """Rows of comma-separated values; the first row names the columns."""
    yield from _read_table(path, drop, ",")


def read_tsv(path: Path, drop: Drop) -> Numbered:
    """Rows of tab-separated values; the first row names the columns."""
    yield from _read_table(path, drop, "\t")


def _read_table(path: Path, drop: Drop, delimiter: str) -> Numbered:
    """The number of a row is the line it begins on, as quoted values may hold line ends."""
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    lines = (line + "\n" for _, line in iterate_lines(path))
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    names: list[str] = []
    while True:
        first_line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            reason = (
                f"lines {first_line} to {reader.line_num} cannot be read ({error}). Close every "
                "quotation mark, and double those inside a value."
            )
            drop(first_line, "bad-csv", reason, "")
            continue
        if values is None:
            return
        if quoting == csv.QUOTE_NONE:
            values = [_unquote(value) for value in values]
        if not names:
            names = [value.strip() for value in values]
        elif any(values):
            fields = _to_named(names, values, first_line, drop)
            if fields is not None:
                yield first_line, fields


def _unquote(value: str) -> str:
    """A tab-separated value without quotation marks around the whole of it.

    Marks that open a value and do not close it belong to the text, which is why
    the csv module's own rule is not used for tabs.
    """
    inner = value[1:-1]
    is_quoted = len(value) > 1 and value[0] == value[-1] == '"'
    return inner.replace('""', '"') if is_quoted and '"' not in inner.replace('""', "") else value


def _to_named(
    names: list[str], values: list[str], number: int, drop: Drop
) -> dict[str, str] | None:
    shown = " | ".join(values)
    bad = find_bad_byte(shown)
    if bad:
        drop(number, "bad-encoding", _encoding_reason(bad), shown)
        return None
    if len(values) != len(names):
        drop(
            number,
            "wrong-columns",
            f"the row has {len(values)} values, but the header names {len(names)} columns. "
            "Quote values that hold the separator or a line end.",
            shown,
        )
        return None
    return dict(zip(names, values, strict=True))


def read_parquet(path: Path, drop: Drop) -> Numbered:  # noqa: ARG001 - Parquet has no bad rows
    """Rows of a Parquet file, a thousand at a time.

    Raises:
        DataError: the file is damaged.
        MachineError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise MachineError(
            f"{path}: Parquet needs the package pyarrow, which is not installed. "
            "Run: pip install 'lorakeet[parquet]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet after row {number} ({error}). "
            "Take the file from a copy."
        ) from error
