"""One request on its way through the engine, and what its sender hears of it.

    sender ── Job ──> Engine.submit ── Ticket ──> Scheduler ──> worker
       ^                                                          |
       └────── TextPiece, TextPiece, ..., Finished | Failed ──────┘

A sender gives a sink, a function that takes events.  It is called from the
worker's thread and must return at once.  The last event is ``Finished`` or
``Failed``, always exactly one of them, whatever happens to the request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from lorakeet.base.errors import LorakeetError
from lorakeet.base.records import Completion
from lorakeet.infer.sampling import SamplingSettings
from lorakeet.serve.adapter_store import AdapterVersion


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked: a model's name, a prompt and how tokens are drawn.

    Args:
        prompt: token ids, at least one.
        sampling: ``max_new_tokens`` is clamped by the engine.
    """

    model: str
    prompt: tuple[int, ...]
    sampling: SamplingSettings


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The whole answer and its cost; nothing follows."""

    completion: Completion


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Why there is no answer; nothing follows."""

    error: LorakeetError


Event = TextPiece | Finished | Failed
Sink = Callable[[Event], None]


class Ticket:
    """A submitted job with the adapter version it holds.

    Args:
        version: held until the last event; None for the base.
        sink: takes the events.
        when_cancelled: called once when the sender leaves.
    """

    def __init__(
        self,
        job: Job,
        version: AdapterVersion | None,
        sink: Sink,
        when_cancelled: Callable[[], object],
    ) -> None:
        self.job = job
        self.version = version
        self._sink = sink
        self._when_cancelled = when_cancelled
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._is_finished = False

    @property
    def group(self) -> Hashable:
        """Requests of one adapter version share a batch; all else is settled row by row."""
        return self.version.digest if self.version else "base"

    @property
    def num_prompt_tokens(self) -> int:
        """The length of the prompt."""
        return len(self.job.prompt)

    @property
    def max_new_tokens(self) -> int:
        """The longest answer, in tokens."""
        return self.job.sampling.max_new_tokens

    @property
    def is_cancelled(self) -> bool:
        """Whether the sender has left."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Says that nobody waits for the answer any more; safe to repeat."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self._when_cancelled()

    def send_text(self, text: str) -> None:
        """Passes a piece of the answer on, unless the ticket is finished."""
        if text and not self._is_finished:
            self._sink(TextPiece(text=text))

    def finish(self, event: Finished | Failed) -> bool:
        """Sends the last event; only the first call does anything.

        Returns:
            whether this was the first call.
        """
        with self._lock:
            if self._is_finished:
                return False
            self._is_finished = True
        self._sink(event)
        return True
