"""Who hears a run's events, and the events around each of its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lorakeet.base.events import Emit, EventLog
from lorakeet.base.run_folder import RunFolder


def open_sinks(run: RunFolder, emit: Emit | None = None) -> Emit:
    """One ``emit`` that writes the diary and TensorBoard, raises alarms and tells the caller."""
    from lorakeet.monitor.alarms import AlarmWatch
    from lorakeet.monitor.sinks import fan_out
    from lorakeet.monitor.tensorboard import TensorboardSink

    listeners: list[Emit] = [EventLog(run.events).emit, TensorboardSink(run.tensorboard)]
    listeners += [emit] if emit else []
    told = fan_out(*listeners)
    return fan_out(told, AlarmWatch(told))


@contextmanager
def stage(emit: Emit, name: str) -> Iterator[None]:
    """Events around a stage, with its duration."""
    started_s = time.perf_counter()
    emit("stage_started", stage=name)
    yield
    emit("stage_finished", stage=name, duration_s=time.perf_counter() - started_s)
