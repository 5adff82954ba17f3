"""Readers of documents: plain text, Markdown, HTML and PDF as rows ``{"text": passage}``.

Each reader is a generator of ``(number, fields)``.  The number is the passage's
position in the file, and for PDF its page.  A document that cannot be used at
all raises DataError; a passage or page that cannot is reported and left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import quantiles
from typing import Any

from lorakeet.base.errors import DataError
from lorakeet.data.encodings import find_bad_byte, iterate_lines, open_bytes, read_text
from lorakeet.data.passages import to_passages

Numbered = Iterator[tuple[int, dict[str, Any]]]
Drop = Callable[[int, str, str, str], None]  # number, code, reason, preview

_WRAPPED_FRACTION = 0.75  # a line this long, against the page's longest, goes on in the next
_STARTS_BLOCK = re.compile(
    r"\s*(?:[#>|`]|[-*•·–]\s|\(?\d{1,3}[.)、．]|[（(]?[一二三四五六七八九十]+[)）、])"
)
_WIDE_CHAR = re.compile("[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")


def read_txt(path: Path, drop: Drop) -> Numbered:
    """Passages of a plain text, numbered from 1."""
    lines = (line for _, line in iterate_lines(path))
    yield from _numbered_passages(to_passages(lines), drop)


def read_markdown(path: Path, drop: Drop) -> Numbered:
    """Passages of a Markdown file, each under the headings it belongs to."""
    lines = (line for _, line in iterate_lines(path))
    yield from _numbered_passages(to_passages(lines, is_markdown=True), drop)


def read_html(path: Path, drop: Drop) -> Numbered:
    """Passages of a web page without menus and footers; headings and tables stay as Markdown.

    Raises:
        DataError: no readable text is left, as in a page that is filled by a script.
    """
    import trafilatura  # seconds to import; only web pages need it

    html = read_text(path)
    text = trafilatura.extract(
        html, output_format="markdown", include_tables=True, include_comments=False,
        include_formatting=True, favor_recall=True,
    )  # fmt: skip
    if not text:
        raise DataError(
            f"{path}: no readable text was found in {len(html):,} characters of HTML. Pages "
            "that a script fills hold none; save the page from a browser or copy its text."
        )
    lines = text.splitlines()
    yield from _numbered_passages(to_passages(lines, is_markdown=True), drop)


def _numbered_passages(passages: Iterator[str], drop: Drop) -> Numbered:
    for number, passage in enumerate(passages, start=1):
        bad = find_bad_byte(passage)
        if bad:
            drop(number, "bad-encoding", _bad_byte_reason(bad), passage)
        else:
            yield number, {"text": passage}


def _bad_byte_reason(byte: str) -> str:
    return (
        f"the byte {byte} does not fit the file's encoding, so the text is damaged there. "
        "Save the file as UTF-8."
    )


def read_pdf(path: Path, drop: Drop) -> Numbered:
    """Passages of a PDF, page by page; the number is the page.

    Raises:
        DataError: the file is damaged or locked, or no page holds text (a scan).
    """
    import pypdfium2

    with open_bytes(path) as file:
        content = file.read()
    if not content:
        raise DataError(f"{path}: the file is empty. Take it from a copy.")
    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        raise DataError(
            f"{path}: cannot be read as PDF ({error}). If it has a password, remove it; "
            "if it is damaged, take it from a copy."
        ) from error
    empty_pages = []
    try:
        num_pages = len(document)
        for number in range(1, num_pages + 1):
            text = to_paragraphs(_read_page(document, number, drop))
            if not text:
                empty_pages.append(number)
            for passage in to_passages(text.splitlines()):
                yield number, {"text": passage}
    finally:
        document.close()
    if len(empty_pages) == num_pages:
        raise DataError(
            f"{path}: none of its {num_pages} pages holds text; it is probably a scan. "
            "Run a text recognition (OCR) program on it first."
        )
    for number in empty_pages:
        drop(number, "page-without-text", "the page holds no text, only pictures or nothing.", "")


def _read_page(document: Any, number: int, drop: Drop) -> str:
    import pypdfium2

    try:
        page = document[number - 1]
        text_page = page.get_textpage()
        text = text_page.get_text_range()
        text_page.close()
        page.close()
    except pypdfium2.PdfiumError as error:
        drop(number, "damaged-page", f"the page cannot be read ({error}).", "")
        return ""
    return text


def to_paragraphs(page: str) -> str:
    """The text of a PDF page with its printed lines joined into paragraphs.

    PDF knows lines only.  A line that is nearly as long as the page's long ones
    goes on in the next one; a short one ends its paragraph.  Words hyphenated at
    a line end come as U+FFFE and are joined; Chinese lines join without a space.

    >>> to_paragraphs("A line of the usual length\\r\\nthat goes on.\\r\\nNext adap\\ufffetation.")
    'A line of the usual length that goes on.\\n\\nNext adaptation.'
    """
    lines = [line.rstrip() for line in page.replace("\ufffe", "").replace("\r", "").split("\n")]
    lines = [line for line in lines if line.strip()]
    if len(lines) < 2:
        return "\n".join(lines).strip()
    usual = quantiles([_width(line) for line in lines], n=10)[-1]
    joined = [lines[0]]
    for previous, line in zip(lines, lines[1:], strict=False):
        is_long = _width(previous) >= _WRAPPED_FRACTION * usual and not previous.startswith("#")
        if is_long and not _STARTS_BLOCK.match(line):
            joined[-1] += _glue(previous, line.lstrip()) + line.lstrip()
        elif line[0] == " " or max(_width(previous), _width(line)) < usual / 3:
            joined[-1] += "\n" + line  # indented code, or a list of short lines, is one block
        else:
            joined.append(line)
    return "\n\n".join(joined).strip()


def _width(line: str) -> int:
    """The printed width in Latin letters; a Chinese character is two wide."""
    return len(line) + len(_WIDE_CHAR.findall(line))


def _glue(left: str, right: str) -> str:
    is_wide = _WIDE_CHAR.match(left[-1]) and _WIDE_CHAR.match(right[0])
    return "" if is_wide else " "
