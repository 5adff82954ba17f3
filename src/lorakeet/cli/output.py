"""How a command speaks: tables for people, one JSON value for machines, errors on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

CONSOLE = Console(highlight=False)
ERRORS = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON value on standard output and nothing else."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, words: Sequence[str] = ()
) -> None:
    """A table whose first column, and those named in ``words``, are words, the others figures."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify=_side(number, column, words), overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    CONSOLE.print(table)


def _side(number: int, column: str, words: Sequence[str]) -> Literal["left", "right"]:
    """Words begin at the left, figures end at the right."""
    return "left" if number == 0 or column in words else "right"


def print_error(message: str) -> None:
    """An expected failure: red word, then the three parts of the message."""
    for line in message.splitlines():
        ERRORS.print(f"[bold red]error[/] {escape(line)}", soft_wrap=True)


def print_done(message: str) -> None:
    """What a command left behind."""
    CONSOLE.print(f"[bold green]done[/] {escape(message)}", soft_wrap=True)
