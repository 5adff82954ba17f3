"""Full, read-only and vanished disks: a clear message, the state before loads, nothing is lost.

A fault is put before the n-th operation that writes below the run's folder and stays on
from there, as on a disk that is full.  ``pytest -m slow`` tries 12 places of a run;
LORAKEET_KILL_TRIALS=200 asks for more.
"""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from lorakeet.api.runs import list_runs
from lorakeet.api.training import resume, train
from lorakeet.base.errors import InterruptedRun, LorakeetError, RequestError
from lorakeet.base.run_folder import RunFolder
from lorakeet.train.checkpoint import read_newest_checkpoint, write_checkpoint
from tests.killed_runs import in_child, wait_for, write_work
from tests.train.runs import Listener
from tests.train.test_kill import KillBench, digest_of, make_state, watch_writes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
QUICK_PLACES, SLOW_PLACES = (0.0, 0.45, 0.9), 12


def break_writes(folder, number, place, first):
    """Operations below a folder fail with an error number from the ``first`` on; counts them."""
    seen = []

    def hear():
        seen.append(1)
        if first and len(seen) >= first:
            raise OSError(number, os.strerror(number))

    watch_writes(folder, hear)
    return lambda: place.write_text(str(len(seen)))


def run_and_tell(work, place):
    """What a piece of work ended with, as a line in a file."""
    try:
        work()
        told = "done"
    except LorakeetError as error:
        told = f"{type(error).__name__} {error}"
    except BaseException as error:  # noqa: BLE001 - a bug, which the test shows
        told = f"crash {type(error).__name__} {error}"
    place.write_text(told)


class FaultBench(KillBench):
    """Runs beside an undisturbed one, each on a disk that fails from some operation on."""

    def __init__(self, folder):
        write_work(folder)
        super().__init__(folder, folder / "runs")
        place = folder / "count"

        def count():
            tell = break_writes(folder / "counted", errno.ENOSPC, place, first=0)
            train(self.recipe, folder / "counted")
            tell()

        assert wait_for(in_child(count)) == 0
        self.num_writes = int(place.read_text())

    def run_trial(self, first, number=errno.ENOSPC):
        """The run meets the fault, tells it, and is resumed when it is gone."""
        run, place = self.folder / f"fault-{number}-{first}", self.folder / "told"

        def meet():
            break_writes(run, number, place, first)
            run_and_tell(lambda: train(self.recipe, run), place)

        assert wait_for(in_child(meet)) == 0
        told = place.read_text()
        assert told.startswith("MachineError"), (first, told)
        assert os.strerror(number) in told or "the disk is full" in told, (first, told)
        heard = Listener()
        read_newest_checkpoint(RunFolder(run).checkpoints, heard)
        assert not heard.all("alarm"), (first, heard.events)
        assert wait_for(self.start(run)) == 0, (first, told)
        assert digest_of(run) == self.digest, (first, told)
        assert not [*run.rglob("*.tmp"), *run.rglob("*.old")], (first, told)
        shutil.rmtree(run)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return FaultBench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("share", QUICK_PLACES)
def test_a_run_that_meets_a_full_disk_says_so_and_goes_on_later(share, bench):
    bench.run_trial(1 + int(share * bench.num_writes))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_disk_may_be_full_at_any_write_of_a_run(bench, tally):
    asked = int(os.environ.get("LORAKEET_KILL_TRIALS", SLOW_PLACES))
    places = random.Random(0).sample(range(1, bench.num_writes), min(asked, bench.num_writes - 1))
    add = tally("runs that met a full disk at a write and ended with the same bytes", len(places))
    for first in places:
        bench.run_trial(first)
        add()


def test_a_folder_that_cannot_be_written_is_told_at_once(bench):
    bench.run_trial(1, errno.EROFS)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_fault_before_any_operation_of_a_save_leaves_the_state_before(number, tmp_path, tally):
    place, whole = tmp_path / "told", tmp_path / "whole"

    def save(folder, first):
        write_checkpoint(folder, make_state(1))
        tell = break_writes(folder, number, place, first)
        run_and_tell(lambda: write_checkpoint(folder, make_state(2)), place)
        if not first:
            tell()

    assert wait_for(in_child(lambda: save(whole, 0))) == 0
    count = int(place.read_text())
    assert count >= 6
    add = tally("disk faults before an operation of a save that left a whole state", count)
    for first in range(1, count + 1):
        folder = tmp_path / f"fault-{first}"
        assert wait_for(in_child(lambda f=folder, n=first: save(f, n))) == 0
        told, heard = place.read_text(), Listener()
        state = read_newest_checkpoint(folder, heard)
        assert told.startswith("MachineError") or (told == "done" and state.step == 2), told
        assert state.step in (1, 2) and not heard.all("alarm"), (first, told)
        write_checkpoint(folder, make_state(3))
        assert read_newest_checkpoint(folder, heard).step == 3
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], first
        add()


FILL = """
import os, sys
from pathlib import Path
import torch
from lorakeet.base.errors import MachineError
from lorakeet.train.checkpoint import Checkpoint, read_newest_checkpoint, write_checkpoint

disk = Path(sys.argv[1])
folder, ballast = disk / "checkpoints", disk / "ballast"

def state(step):
    tensors = {"w": torch.full((64, 64), float(step))}
    return Checkpoint(step=step, trained=tensors, moments=tensors, best=tensors, progress={})

def alarm(kind, /, **fields):
    raise AssertionError(fields)

write_checkpoint(folder, state(1))
facts = os.statvfs(disk)
needed = 20 * 4096
for room in range(0, needed, 4096):
    free = os.statvfs(disk).f_bavail * facts.f_frsize
    with ballast.open("wb") as file:
        file.write(bytes(max(0, free - room)))
    try:
        write_checkpoint(folder, state(2))
        print("whole", room)
    except MachineError as error:
        assert "the disk is full" in str(error) and "bytes" in str(error), error
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["step-000001"], names
        print("full", room)
    ballast.unlink()
    found = read_newest_checkpoint(folder, alarm)
    assert float(found.trained["w"][0, 0]) == found.step
    if found.step == 2:
        import shutil
        shutil.rmtree(folder / "step-000002")
        if not (folder / "step-000001").exists():
            write_checkpoint(folder, state(1))
"""


def test_a_really_full_disk_of_any_size_keeps_the_state_before(tmp_path):
    """A small memory disk in a namespace of its own, with room for 0, 1, 2 ... pages."""
    namespace = [] if not shutil.which("unshare") else ["unshare", "-rm", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=2m none {tmp_path} && "
    if not namespace or subprocess.run([*namespace, mount + "true"], check=False,
                                       capture_output=True).returncode:  # fmt: skip
        pytest.skip("no memory disk can be mounted here")
    (script := tmp_path.with_name("fill.py")).write_text(FILL)
    done = subprocess.run([*namespace, f"{mount} exec {sys.executable} {script} {tmp_path}"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [line.split()[0] for line in done.stdout.splitlines()]
    assert outcomes.count("full") >= 12 and outcomes.count("whole") >= 2
    assert outcomes == sorted(outcomes), "more room never makes a save fail"


def test_a_folder_that_vanishes_is_not_made_anew_and_the_run_goes_on_when_it_is_back(bench):
    run, away = bench.folder / "vanishing", bench.folder / "unmounted"
    place = bench.folder / "told"

    def leave(kind, /, **fields):
        if kind == "step" and fields["step"] == 3:
            run.rename(away)

    def meet():
        run_and_tell(lambda: train(bench.recipe, run, emit=leave), place)

    assert wait_for(in_child(meet)) == 0
    told = place.read_text()
    assert told.startswith("MachineError") and "gone" in told and not run.exists(), told
    away.rename(run)
    assert wait_for(bench.start(run)) == 0 and digest_of(run) == bench.digest


def test_a_damaged_shard_is_told_and_built_again_from_the_sources(bench):
    run, place = bench.folder / "shards", bench.folder / "told"

    def work():
        heard = Listener()
        with suppress(InterruptedRun):
            train(bench.recipe, run, emit=heard,
                  stop_requested=lambda: len(heard.all("step")) == 2)  # fmt: skip
        shard = run / "data" / "train" / "ids.bin"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        resume(run, emit=heard)
        (told,) = [alarm for alarm in heard.all("alarm") if alarm["code"] == "damaged-data"]
        assert "ids.bin" in told["message"] and "built again" in told["message"]

    assert wait_for(in_child(lambda: run_and_tell(work, place))) == 0
    assert place.read_text() == "done" and digest_of(run) == bench.digest


def test_a_clock_that_jumps_changes_no_byte_and_no_order(bench):
    run, honest, draw = bench.folder / "jumping", time.time, random.Random(0)
    place = bench.folder / "told"

    def work():
        time.time = lambda: honest() + draw.uniform(-(10**8), 10**8)
        heard = []

        def hear(kind, /, **_):
            heard.append(kind)

        try:
            train(bench.recipe, run, emit=hear, stop_requested=lambda: heard.count("step") == 2)
        except InterruptedRun:
            resume(run)

    assert wait_for(in_child(lambda: run_and_tell(work, place))) == 0
    assert place.read_text() == "done" and digest_of(run) == bench.digest
    (entry,) = [e for e in list_runs(bench.folder) if e.name == "jumping"]
    assert entry.state == "finished" and entry.steps == 6


def test_of_two_runs_that_start_in_one_folder_one_is_refused_and_one_is_whole(bench):
    run = bench.folder / "shared"
    places = [bench.folder / f"told-{n}" for n in range(2)]
    children = [
        in_child(lambda p=place: run_and_tell(lambda: train(bench.recipe, run), p))
        for place in places
    ]
    assert [wait_for(child) for child in children] == [0, 0]
    told = sorted(place.read_text() for place in places)
    assert told[0].startswith(RequestError.__name__) and told[1] == "done", told
    assert digest_of(run) == bench.digest
