"""Processes that work on pieces of a stream; the results come back in the stream's order.

The first pieces are worked on here, as a small stream is done before a process has
started.  Workers are started as ``python -m lorakeet.data.workers`` and reached through
their standard streams.  multiprocessing's own pools would import the user's script again
(so that a script without a main guard starts itself) or fork a process that has threads.

Guarantees: at most two pieces a worker are on the way, so memory does not grow with the
stream; the results do not depend on the number of workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from lorakeet.base.errors import LorakeetError, MachineError

PIECES_HERE = 32
PIECES_ON_THE_WAY = 2
MAX_WORKERS = 16  # one process reads and writes for all, which is what holds up more


def count_workers() -> int:
    """Processes that pay on this machine; 0 where a single core would be shared.

    On Windows, whose pipes are of another kind, the work stays in one process.
    """
    if sys.platform == "win32":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, MAX_WORKERS) if cores and cores > 1 else 0


def map_pieces(
    work: Callable[[Any], Any], pieces: Iterable[Any], num_workers: int
) -> Iterator[tuple[Any, Any]]:
    """Each piece with ``work(piece)``, in order.

    Args:
        work: an object that can be sent to another process; it is sent once.
        num_workers: 0 works here alone.

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
        waiting: deque[tuple[Any, _Worker]] = deque()
        for turn, piece in enumerate(chain([first], stream)):
            if len(waiting) == PIECES_ON_THE_WAY * num_workers:
                yield _receive(waiting)
            worker = workers[turn % num_workers]
            worker.send(piece)
            waiting.append((piece, worker))
        while waiting:
            yield _receive(waiting)


def _receive(waiting: deque[tuple[Any, _Worker]]) -> tuple[Any, Any]:
    """The oldest piece on the way and its result."""
    piece, worker = waiting.popleft()
    try:
        result = worker.results.recv()
    except (EOFError, OSError) as error:
        raise _died() from error
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
        self.pieces = Connection(os.dup(told.fileno()), readable=False)
        self.results = Connection(os.dup(heard.fileno()), writable=False)
        told.close()
        heard.close()
        self.send(work)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.pieces.close()
        self.results.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def send(self, piece: Any) -> None:
        """Hands over a piece.

        Raises:
            MachineError: the process is gone.
        """
        try:
            self.pieces.send(piece)
        except OSError as error:
            raise _died() from error


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
    Thread(target=_read_on, args=(pieces, waiting), daemon=True).start()
    while (found := waiting.get()) is not None:
        try:
            result = work(*found)
        except LorakeetError as error:
            result = error
        try:
            results.send(result)
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
