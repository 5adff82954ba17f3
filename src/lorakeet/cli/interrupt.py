"""Ctrl-C and SIGTERM as a wish to stop, which the training loop asks about after each step.

The first signal asks; a second one of the same kind ends the process at once.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lorakeet.cli.output import ERRORS


@contextmanager
def watch_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether the user asked to stop."""
    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        ERRORS.print("\nstopping after this step; press Ctrl-C again to end at once.")
        signal.signal(number, older[number])

    older = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in older.items():
            signal.signal(number, handler)
