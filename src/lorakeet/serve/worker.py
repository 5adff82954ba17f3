"""One thread that owns the model: chores first, then the next piece of work.

PyTorch modules must not change while another thread runs them.  So whatever
reads or changes weights is a task of this thread: ``call`` asks for one more
round of work, ``run`` and ``add_chore`` put a task before it.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from lorakeet.base.errors import LorakeetError, MachineError

T = TypeVar("T")


class Worker:
    """A thread that does chores and rounds of work, one after the other.

    Args:
        work: one round; returns at once when there is nothing to do.
        when_crashed: told of what a round raised; the thread goes on.
    """

    def __init__(
        self, work: Callable[[], None], when_crashed: Callable[[BaseException], None]
    ) -> None:
        self._work = work
        self._when_crashed = when_crashed
        self._chores: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lorakeet-engine")
        self.is_closed = False

    def call(self) -> bool:
        """Asks for one more round and returns at once; False when the worker is closed."""
        if self.is_closed:
            return False
        try:
            self._executor.submit(self._round).add_done_callback(self._look_back)
        except RuntimeError:  # closed since the line above
            return False
        return True

    def add_chore(self, chore: Callable[[], None]) -> bool:
        """Has a task done before the next round; returns at once, as ``call`` does."""
        self._chores.put(chore)
        return self.call()

    def run(self, task: Callable[[], T]) -> T:
        """What a task returns or raises; waits until the round before it has ended.

        Raises:
            MachineError: the worker is closed.
        """
        outcome: Future[T] = Future()
        if not self.add_chore(lambda: _fulfil(outcome, task)):
            raise MachineError("The engine is closed. Start it again before asking.")
        return outcome.result()

    def close(self) -> None:
        """Waits for the round that runs and ends the thread; safe to repeat."""
        self.is_closed = True
        self._executor.shutdown(wait=True)

    def _round(self) -> None:
        while not self._chores.empty():
            self._chores.get()()
        self._work()

    def _look_back(self, done: Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            self._when_crashed(error)


def _fulfil(outcome: Future[T], task: Callable[[], T]) -> None:
    """Runs a task for a thread that waits for its outcome."""
    try:
        outcome.set_result(task())
    except (LorakeetError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        outcome.set_exception(error)
