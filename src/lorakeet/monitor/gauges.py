"""What events say about a run: series for plots and the state of the moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Args:
        state: waiting, running, finished or interrupted.
        remaining_s: at the pace of the last steps; None when unknown.
    """

    state: str
    step: int
    num_steps: int
    loss: float | None
    tokens_per_s: float | None
    remaining_s: float | None


def read_series(events: Iterable[Event], kind: str, field: str) -> list[tuple[int, float]]:
    """(step, value) of a field; the latest value wins where a resumed run repeats a step.

    >>> read_series([{"kind": "step", "step": 1, "loss": 2.0}], "step", "loss")
    [(1, 2.0)]
    """
    found: dict[int, float] = {}
    for event in events:
        if event["kind"] == kind:
            value = event.get(field, event.get("values", {}).get(field))
            if value is not None:
                found[event["step"]] = value
    return sorted(found.items())


def read_progress(events: Iterable[Event]) -> Progress:
    """The state of a run from its diary."""
    state, last, recent = "waiting", {}, []
    for event in events:
        kind = event["kind"]
        if kind in ("run_started", "step", "stage_started"):
            state = "running"
        elif kind == "run_finished":
            state = "finished"
        elif kind == "run_interrupted":
            state = "interrupted"
        if kind == "step":
            last = event
            recent = [*recent[-9:], event["duration_s"]]
    left = last.get("num_steps", 0) - last.get("step", 0)
    pace_s = sum(recent) / len(recent) if recent else None
    return Progress(
        state=state, step=last.get("step", 0), num_steps=last.get("num_steps", 0),
        loss=last.get("loss"), tokens_per_s=last.get("tokens_per_s"),
        remaining_s=left * pace_s if pace_s is not None and state == "running" else None,
    )  # fmt: skip
