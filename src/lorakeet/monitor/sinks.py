"""Joining listeners: one event, told to each in turn."""

from __future__ import annotations

from typing import Any

from lorakeet.base.events import Emit


def fan_out(*sinks: Emit) -> Emit:
    """An ``emit`` that tells every sink in the given order."""

    def emit(kind: str, /, **fields: Any) -> None:
        for sink in sinks:
            sink(kind, **fields)

    return emit


def quiet(kind: str, /, **fields: Any) -> None:
    """A sink that hears and says nothing."""
