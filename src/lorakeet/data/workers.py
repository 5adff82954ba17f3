"""Processes that work on pieces of a stream beside this one; results come in the stream's order.

    piece -> a worker whose hands are free, else -> this process -> results, the oldest first

The first pieces are worked on here alone, as a small stream is done before a process has
started, and what the work has learned from them goes with it.  Workers are started as
``python -m lorakeet.data.workers`` and reached through their standard streams.
multiprocessing's own pools would import the user's script again (so that a script without a
main guard starts itself) or fork a process that has threads.

Guarantees: at most a few pieces a worker are on the way, so memory does not grow with the
stream; the results do not depend on the number of workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from lorakeet.base.errors import LorakeetError, MachineError

PIECES_HERE = 4
PIECES_ON_THE_WAY = 2
PIECES_WAITING = 4  # a worker; those that are done wait for an older one
MAX_WORKERS = 16  # one process reads and writes for all, which is what holds up more
PIPE_BYTES = 2**20  # a piece and its result pass without waiting for the other side


def count_workers() -> int:
    """Processes that pay beside this one, which works too; 0 on a single core.

    On Windows, whose pipes are of another kind, the work stays in one process.
    """
    if sys.platform == "win32":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min((cores or 1) - 1, MAX_WORKERS)


def map_pieces(
    work: Callable[[Any], Any], pieces: Iterable[Any], num_workers: int
) -> Iterator[tuple[Any, Any]]:
    """Each piece with ``work(piece)``, in order.

    Args:
        work: an object that can be sent to another process; it is sent once.
        num_workers: beside this process; 0 works here alone.

    Raises:
        LorakeetError: the one that ``work`` raised.
        MachineError: a worker died.
    """
    stream = iter(pieces)
    for number, piece in enumerate(stream, start=1):
        yield piece, work(piece)
        if num_workers and number == PIECES_HERE:
            break
    else:
        return
    first = next(stream, None)
    if first is None:
        return
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(work)) for _ in range(num_workers)]
        yield from _share(work, chain([first], stream), workers)


def _share(
    work: Callable[[Any], Any], pieces: Iterable[Any], workers: list[_Worker]
) -> Iterator[tuple[Any, Any]]:
    """Pieces to whoever is free: the workers first, then this process."""
    waiting: deque[tuple[Any, _Worker | None, Any]] = deque()
    for piece in pieces:
        while waiting and (_is_done(waiting) or len(waiting) > PIECES_WAITING * len(workers)):
            yield _take_oldest(waiting)
        free = next((worker for worker in workers if worker.is_free()), None)
        if free is None:
            waiting.append((piece, None, _attempt(work, piece)))
        else:
            free.send(piece)
            waiting.append((piece, free, None))
    while waiting:
        yield _take_oldest(waiting)


def _attempt(work: Callable[[Any], Any], piece: Any) -> Any:
    """The result of a piece, or its error, which is raised when the pieces before it are done."""
    try:
        return work(piece)
    except LorakeetError as error:
        return error


def _is_done(waiting: deque[tuple[Any, _Worker | None, Any]]) -> bool:
    """Whether the oldest piece has its result."""
    worker = waiting[0][1]
    return worker is None or worker.has_told()


def _take_oldest(waiting: deque[tuple[Any, _Worker | None, Any]]) -> tuple[Any, Any]:
    """The oldest piece and its result, waited for where a worker is still at it."""
    piece, worker, result = waiting.popleft()
    if worker is not None:
        result = worker.receive()
    if isinstance(result, LorakeetError):
        raise result
    return piece, result


class _Worker:
    """A process that holds ``work``; leaving the context ends it."""

    def __init__(self, work: Any) -> None:
        environment = {
            **os.environ, "TOKENIZERS_PARALLELISM": "false",  # a process is one core's worth
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorakeet.data.workers"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment,
        )  # fmt: skip
        told, heard = self.process.stdin, self.process.stdout
        assert told is not None and heard is not None
        for pipe in (told, heard):
            _widen(pipe.fileno())
        self.pieces = Connection(os.dup(told.fileno()), readable=False)
        self.results = Connection(os.dup(heard.fileno()), writable=False)
        told.close()
        heard.close()
        self.is_ready, self.num_held = False, 0
        self._tell(work)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.pieces.close()
        self.results.close()
        self.process.kill()  # it holds nothing that is not here
        self.process.wait()

    def is_free(self) -> bool:
        """Whether it has loaded the work and can hold another piece.

        Raises:
            MachineError: the process is gone.
        """
        if not self.is_ready and self.has_told():
            self._hear()
            self.is_ready = True
        return self.is_ready and self.num_held < PIECES_ON_THE_WAY

    def has_told(self) -> bool:
        """Whether something of it has come, if only its end."""
        return self.results.poll()

    def send(self, piece: Any) -> None:
        """Hands over a piece.

        Raises:
            MachineError: the process is gone.
        """
        self._tell(piece)
        self.num_held += 1

    def receive(self) -> Any:
        """The result of the oldest piece that it holds.

        Raises:
            MachineError: the process is gone.
        """
        self.num_held -= 1
        return self._hear()

    def _tell(self, content: Any) -> None:
        try:
            self.pieces.send(content)
        except OSError as error:
            raise _died() from error

    def _hear(self) -> Any:
        try:
            return self.results.recv()
        except (EOFError, OSError) as error:
            raise _died() from error


def _widen(pipe: int) -> None:
    """Lets a pipe hold more, where the system can."""
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _died() -> MachineError:
    return MachineError(
        "a process that encodes rows ended before its work was done, most often because the "
        "machine ran out of memory. Set data.workers: 0 to encode in one process."
    )


def main() -> None:
    """A worker: takes the work and then piece after piece until standard input closes.

    A thread reads on while a result is written, as two processes that write to each other
    and do not read would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides
    pieces = Connection(os.dup(sys.stdin.fileno()), writable=False)
    results = Connection(os.dup(sys.stdout.fileno()), readable=False)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed must not mix with results
    waiting: SimpleQueue[tuple[Any] | None] = SimpleQueue()
    work = pieces.recv()
    results.send("ready")
    Thread(target=_read_on, args=(pieces, waiting), daemon=True).start()
    while (found := waiting.get()) is not None:
        try:
            results.send(_attempt(work, *found))
        except BrokenPipeError:
            return


def _read_on(pieces: Connection, waiting: SimpleQueue[tuple[Any] | None]) -> None:
    """Hands on pieces as they come; None at their end."""
    try:
        while True:
            waiting.put((pieces.recv(),))
    except EOFError:
        waiting.put(None)


if __name__ == "__main__":
    main()
