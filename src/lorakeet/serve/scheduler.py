"""Which requests are answered together, and in which order: plain Python, no tensors.

Requests that agree on what one forward pass must share (the adapter version)
have equal ``group`` and may form a batch.  The oldest waiting request always
leads the next batch, so none starves; the others of its group join it in the
order they came, as far as the limits allow:

    waiting, oldest first   a1  b1  a2  c1  a3        batches   [a1 a2 a3] [b1] [c1]

Source: the split of a decision core from tensors follows nano-vllm's scheduler.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lorakeet.base.errors import MachineError


class QueueFullError(MachineError):
    """More requests wait than the server promises to answer in time.

    Args:
        retry_after_s: a guess of when a place is free, in whole seconds.
    """

    def __init__(self, num_waiting: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            f"{num_waiting} requests are waiting, which is the limit. "
            f"Try again in about {retry_after_s} s."
        )


class Schedulable(Protocol):
    """What the scheduler has to know of a request."""

    @property
    def group(self) -> Hashable:
        """Requests of one group may share a batch."""

    @property
    def num_prompt_tokens(self) -> int:
        """The length of the prompt."""

    @property
    def max_new_tokens(self) -> int:
        """The longest answer, in tokens."""

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer."""


R = TypeVar("R", bound=Schedulable)


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How much is waiting and how much runs at once.

    Args:
        max_waiting: requests in the queue; the next one is turned away.
        max_rows: requests in one batch.
        max_tokens: rows times the longest row, prompt and answer; bounds the
            memory of keys and values.  A single request may exceed it.
    """

    max_waiting: int = 64
    max_rows: int = 8
    max_tokens: int = 16_384


class Scheduler:
    """A queue that hands out batches; its methods may be called from any thread."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self._waiting: deque[Schedulable] = deque()
        self._lock = threading.Lock()

    @property
    def num_waiting(self) -> int:
        """Requests that no batch has taken yet."""
        with self._lock:
            return len(self._waiting)

    def submit(self, request: Schedulable, *, seconds_per_request: float = 1.0) -> None:
        """Puts a request at the end of the queue.

        Args:
            seconds_per_request: recent pace, for the hint of when to come back.

        Raises:
            QueueFullError: ``max_waiting`` requests wait already.
        """
        with self._lock:
            num_waiting = sum(not waiting.is_cancelled for waiting in self._waiting)
            if num_waiting >= self.limits.max_waiting:
                seconds = max(1, min(600, round(num_waiting * seconds_per_request)))
                raise QueueFullError(num_waiting, seconds)
            self._waiting.append(request)

    def take_batch(self) -> list[Schedulable]:
        """The next requests to answer together, oldest first; empty when none waits."""
        with self._lock:
            if not self._waiting:
                return []
            batch = [self._waiting.popleft()]
            for request in list(self._waiting):
                if request.group == batch[0].group and self._fits([*batch, request]):
                    batch.append(request)
                    self._waiting.remove(request)
            return batch

    def take_cancelled(self) -> list[Schedulable]:
        """Removes the waiting requests that nobody waits for."""
        with self._lock:
            cancelled = [request for request in self._waiting if request.is_cancelled]
            self._waiting = deque(r for r in self._waiting if not r.is_cancelled)
            return cancelled

    def take_all(self) -> list[Schedulable]:
        """Empties the queue, when the server closes."""
        with self._lock:
            requests = list(self._waiting)
            self._waiting.clear()
            return requests

    def _fits(self, batch: list[Schedulable]) -> bool:
        longest = max(r.num_prompt_tokens for r in batch) + max(r.max_new_tokens for r in batch)
        return len(batch) <= self.limits.max_rows and longest * len(batch) <= self.limits.max_tokens
