"""Bytes as text: which encoding a file has, and its lines without losing the bad ones.

The order of evidence: a byte order mark, then strict UTF-8, then statistics
(charset-normalizer).  GB2312 is read as GB18030, its superset, as files that
claim the first often hold characters of the second.

A single bad byte must cost one row, not the file.  Lines are therefore decoded
with Python's ``surrogateescape``: a byte that does not fit becomes a lone
surrogate U+DC80 to U+DCFF, which no valid text holds, and ``find_bad_byte``
finds it in the finished row.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from charset_normalizer import from_bytes

from lorakeet.base.errors import DataError

SAMPLE_BYTES = 1 << 20  # detection looks at this much; statistics gain nothing from more
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_TEXT = (".pdf", ".parquet")
_ESCAPED_BYTE = re.compile("[\ud800-\udfff]")


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked on the way when its name ends in .gz, .xz or .bz2.

    Raises:
        DataError: the file is missing or may not be read.
    """
    try:
        match path.suffix.lower():
            case ".gz":
                return cast(IO[bytes], gzip.open(path, "rb"))
            case ".xz":
                return lzma.open(path, "rb")
            case ".bz2":
                return bz2.open(path, "rb")
            case _:
                return path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened ({error.strerror}). Check the name and who may read it."
        ) from error


def detect_encoding(sample: bytes) -> str:
    """Python's name of the encoding of a file that begins with these bytes.

    UTF-8 wins whenever at least half of the lines are valid UTF-8: the others
    are then damaged rows, which the readers report one by one.

    >>> detect_encoding("中文。".encode()), detect_encoding("\\ufeffa".encode("utf-16"))
    ('utf-8', 'utf-16')
    """
    for mark, name in _MARKS:
        if sample.startswith(mark):
            return name
    lines = [line for line in sample.splitlines() if line.strip()]
    if lines and len(sample) >= SAMPLE_BYTES:
        lines = lines[:-1] or lines  # the last one may be cut inside a character
    num_bad = sum(not _is_utf8(line) for line in lines)
    if 2 * num_bad <= len(lines):
        return "utf-8"
    best = from_bytes(sample, cp_exclusion=["utf_7"]).best()
    if best is None:
        return "utf-8"
    return "gb18030" if best.encoding in ("gb2312", "gbk") else best.encoding


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_encoding(path: Path) -> str:
    """The encoding of a file by its first MiB.

    Raises:
        DataError: the file is empty, damaged (a broken archive) or holds binary data.
    """
    with open_bytes(path) as file:
        try:
            sample = file.read(SAMPLE_BYTES)
        except DAMAGED as error:
            raise DataError(
                f"{path}: the compressed file is damaged ({error}). Take it from a copy."
            ) from error
    if not sample.strip():
        raise DataError(f"{path}: the file is empty. It needs at least one row or paragraph.")
    encoding = detect_encoding(sample)
    if b"\0" in sample and not encoding.startswith(("utf-16", "utf-32")):
        raise DataError(
            f"{path}: this is binary data (a zero byte at {sample.index(0)}), not text. "
            "Name the file by what it is, such as .pdf or .parquet, or convert it to text."
        )
    return encoding


def find_guess(path: Path) -> str | None:
    """The encoding that was guessed by statistics; None for UTF-8, a mark, or no text.

    A guess can be wrong without a bad byte: most single-byte encodings read any file.
    """
    if path.suffix.lower() in _NO_TEXT:
        return None
    try:
        encoding = read_encoding(path)
    except DataError:
        return None
    is_marked = encoding == "utf-8" or encoding in {name for _, name in _MARKS}
    return None if is_marked else encoding


def open_text(path: Path) -> io.TextIOWrapper:
    """A file as text, bytes that do not fit its encoding kept as lone surrogates.

    Lines end at ``\\n`` only, so line numbers are those of every editor.
    """
    encoding = read_encoding(path)
    return io.TextIOWrapper(
        open_bytes(path), encoding=encoding, errors="surrogateescape", newline="\n"
    )


def read_text(path: Path) -> str:
    """The whole text of a file; for formats that cannot be read in pieces."""
    with open_text(path) as file:
        try:
            return file.read()
        except DAMAGED as error:
            raise DataError(
                f"{path}: the compressed file is damaged ({error}). Take it from a copy."
            ) from error


def find_bad_byte(text: str) -> str | None:
    """The first byte that did not fit the encoding, as ``0xff``, or None.

    Half a surrogate pair, which JSON can smuggle in as ``\\ud800``, is found likewise.

    >>> find_bad_byte(b"ab\\xff".decode("utf-8", "surrogateescape")), find_bad_byte("ab")
    ('0xff', None)
    """
    found = _ESCAPED_BYTE.search(text)
    if found is None:
        return None
    code = ord(found.group())
    return f"0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def iterate_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and lines without their ends, one at a time.

    A compressed file that breaks off yields what could be unpacked.

    Raises:
        DataError: as ``read_encoding``; or the archive breaks off, after its last good line.
    """
    number = 0
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip("\r\n")
        except DAMAGED as error:
            raise DataError(
                f"{path}: the compressed file breaks off after line {number} ({error}). "
                "The rows before it are good; take the rest from a copy."
            ) from error
