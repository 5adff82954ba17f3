"""Several processes write one registry, and some are killed: it stays whole and loses nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakeet.base.registry import Registry

WRITER = """
import sys, time
from pathlib import Path
from lorakeet.base.registry import Entry, Registry
path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
registry = Registry(path)
for number in range(count):
    entry = Entry(folder=path.parent / f"{name}-{number}", kind="run", state="running",
                  settings={"text": "x" * 2000}, steps=number)
    registry.put(entry)
    print(number, flush=True)
    time.sleep(0.02)  # SQLite's lock is not fair: whoever never rests starves the others
"""
WRITERS, ROWS = 4, 25


def start(path, name, count, **options):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)], text=True, **options
    )


def test_all_rows_of_several_writers_arrive(tmp_path):
    path = tmp_path / "registry.sqlite"
    writers = [start(path, f"w{n}", ROWS, stdout=subprocess.DEVNULL) for n in range(WRITERS)]
    assert [writer.wait() for writer in writers] == [0] * WRITERS
    names = {entry.name for entry in Registry(path).read()}
    assert names == {f"w{n}-{row}" for n in range(WRITERS) for row in range(ROWS)}
    assert not list(tmp_path.glob(".*"))


def kill_writers(path: Path, seed: int) -> int:
    """Kills three writers at random moments; every row that was told as written is there."""
    draw = random.Random(seed)
    outputs, writers = [], []
    for number in range(3):
        output = path.with_name(f"told-{seed}-{number}")
        with output.open("w") as file:
            writers.append(start(path, f"s{seed}k{number}", 10_000, stdout=file))
        outputs.append(output)
    deadline_s = time.monotonic() + 60
    while not all(o.read_text() for o in outputs) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    for writer in writers:
        time.sleep(draw.uniform(0, 0.1))
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
    entries = {entry.name: entry for entry in Registry(path).read()}
    told = [
        f"s{seed}k{n}-{row}" for n, output in enumerate(outputs)
        for row in output.read_text().split("\n")[:-1]
    ]  # fmt: skip
    assert told and all(name in entries for name in told)
    assert all(len(entry.settings["text"]) == 2000 for entry in entries.values())
    return len(told)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow),
                                  pytest.param(2, marks=pytest.mark.slow)])  # fmt: skip
def test_killed_writers_leave_a_whole_registry(seed, tmp_path, tally):
    add = tally("registries whose writers were killed and that lost no row", 1)
    path = tmp_path / "registry.sqlite"
    assert kill_writers(path, seed) > 0
    writer = start(path, "after", 3, stdout=subprocess.DEVNULL)
    assert writer.wait() == 0
    assert {"after-0", "after-1", "after-2"} <= {entry.name for entry in Registry(path).read()}
    add()
