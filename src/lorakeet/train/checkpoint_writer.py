"""Checkpoints written beside the training, so that a step waits for the copy and no longer.

    the loop      copies its state, hands it over, goes on
    the writer    one thread: writes, flushes, hashes, publishes, removes the oldest

One thread means that checkpoints appear in the order of their steps.  One state may wait
while another is written; when the disk is slower than that, or a state is so large that
a second copy would be missed elsewhere, the loop waits, as memory is not endless.

An error of the writer is raised after the next step or at the end, whichever is first.
Where the system gives no thread, each state is written in the loop.
A kill at any moment finds the protocol of ``train.checkpoint``: whole states or none.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from lorakeet.base.errors import LorakeetError
from lorakeet.base.events import Emit
from lorakeet.train.checkpoint import Checkpoint, count_bytes, write_checkpoint

HELD_STATES = 2  # one that is written, one that waits
LARGE_BYTES = 2**30


class CheckpointWriter:
    """The writer of one run; leaving its with block waits until every state is on the disk.

    Args:
        folder: the run's ``checkpoints``.
        emit: told of each published checkpoint and, when another error is already on its
            way, of what could not be written.  It is called by the loop's own thread.
    """

    def __init__(self, folder: Path, emit: Emit) -> None:
        self._folder, self._emit = folder, emit
        self._held: deque[tuple[int, Future[Path]]] = deque()
        self._thread = _start_thread()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the last state; what went wrong is raised, or told beside another error."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        try:
            self.tell()
        except LorakeetError as late:
            if error is None:
                raise
            self._emit("alarm", code="checkpoint", step=0, message=str(late))

    def hand_over(self, state: Checkpoint) -> None:
        """Takes a state to write; it must hold copies that nobody changes.

        Raises:
            MachineError: an earlier state could not be written.
            NumericsError: an earlier state held NaN or infinity.
        """
        room = 0 if count_bytes(state) > LARGE_BYTES else HELD_STATES - 1
        self.tell(max_held=room)
        if self._thread is None:
            path = write_checkpoint(self._folder, state)
            self._emit("checkpoint", step=state.step, path=str(path))
            return
        self._held.append((state.step, self._thread.submit(write_checkpoint, self._folder, state)))

    def tell(self, *, max_held: int = HELD_STATES) -> None:
        """Emits what has been published since, or raises what went wrong.

        Args:
            max_held: waits until no more states than these are written or wait.
        """
        while self._held and (len(self._held) > max_held or self._held[0][1].done()):
            step, written = self._held.popleft()
            self._emit("checkpoint", step=step, path=str(written.result()))


def _start_thread() -> ThreadPoolExecutor | None:
    """A thread that runs already; None where the system gives none, as when memory is short."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    try:
        thread.submit(int).result()
    except RuntimeError:
        return None
    return thread
