"""SIGKILL at any moment: the run is resumed and ends with the bytes of an undisturbed one.

``pytest -m slow`` makes 12 trials; LORAKEET_KILL_TRIALS=200 asks for more.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from lorakeet.api.training import resume, train
from lorakeet.base.run_folder import RunFolder, sha256_file
from lorakeet.train.checkpoint import Checkpoint, read_newest_checkpoint, write_checkpoint
from tests.killed_runs import GOOD, KillTrials, in_child, recipe_of, wait_for, write_work
from tests.train.runs import Listener

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

QUICK_TRIALS, SLOW_TRIALS, MAX_TRIALS, WORKERS = 2, 12, 200, 4


def digest_of(run):
    return sha256_file(adapter_of(run))


def adapter_of(run):
    return RunFolder(run).adapter / "adapter_model.safetensors"


class KillBench(KillTrials):
    """Trials in a folder, of Lorakeet's runs over the work."""

    def __init__(self, work, folder):
        self.recipe = recipe_of(work)
        super().__init__(folder, self.begin_or_go_on, adapter_of)

    def begin_or_go_on(self, run):
        has_run = RunFolder(run).events.exists()
        resume(run) if has_run else train(self.recipe, run)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    work = tmp_path_factory.mktemp("kill")
    write_work(work)
    return KillBench(work, work / "runs")


def is_good(bench, trial):
    run = bench.folder / f"trial-{trial}"
    is_good = bench.run_trial(trial, run) == GOOD
    if is_good and not [*run.rglob("*.tmp"), *run.rglob("*.old")]:
        shutil.rmtree(run)
        return True
    return False


@pytest.mark.parametrize("trial", range(QUICK_TRIALS))
def test_a_killed_run_ends_with_the_same_bytes(trial, bench):
    assert is_good(bench, trial)


def count_failed(work, folder, digest, trials):
    """The part of one worker, whose undisturbed run tells its speed beside the others."""
    bench = KillBench(work, folder)
    failed = [trial for trial in trials if not is_good(bench, trial)]
    (folder / "failed").write_text(str(failed))
    return len(failed) if bench.digest == digest else len(trials)


@pytest.mark.slow
@pytest.mark.timeout(MAX_TRIALS * 60)
def test_many_killed_runs_end_with_the_same_bytes(bench, tally):
    asked = min(int(os.environ.get("LORAKEET_KILL_TRIALS", SLOW_TRIALS)), MAX_TRIALS)
    add = tally("runs killed up to three times that ended with the undisturbed bytes", asked)
    work, workers = bench.folder.parent, {}
    for number in range(WORKERS):
        folder = bench.folder / f"worker-{number}"
        trials = range(1000 + number, 1000 + asked, WORKERS)
        child = in_child(lambda f=folder, t=trials: count_failed(work, f, bench.digest, t))
        workers[child] = folder, len(trials)
    for child, (folder, count) in workers.items():
        num_failed = wait_for(child)
        for _ in range(count - num_failed):
            add()
        assert num_failed == 0, (folder / "failed").read_text()


WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open"}


def watch_writes(folder, on_write):
    """Calls ``on_write`` before every file operation below a folder that changes something."""

    def hear(event, arguments):
        if event not in WRITES or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        on_write()

    sys.addaudithook(hear)  # only ever in a child: such a hook cannot be taken away


def make_state(step):
    weight = torch.full((8, 8), float(step))
    return Checkpoint(step=step, trained={"w": weight}, moments={"w|step": weight}, best={},
                      progress={"looks_since": step})  # fmt: skip


def save_and_count(folder, step, place, die_at):
    """Publishes a checkpoint; dies before the operation ``die_at``, else leaves the count."""
    seen = []

    def hear():
        seen.append(1)
        if len(seen) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_writes(folder, hear)
    write_checkpoint(folder, make_state(step))
    place.write_text(str(len(seen)))


@pytest.mark.parametrize("has_same_step", [False, True])
def test_a_kill_before_any_file_operation_of_a_save_leaves_a_whole_state(
    has_same_step, tmp_path, tally
):
    def prepare(name):
        folder = tmp_path / name
        for step in (1, 2, *([3] if has_same_step else [])):
            write_checkpoint(folder, make_state(step))
        (folder / ".step-000009.tmp").mkdir()
        return folder

    place = tmp_path / "count"
    whole = prepare("whole")
    assert wait_for(in_child(lambda: save_and_count(whole, 3, place, die_at=0))) == 0
    count = int(place.read_text())
    assert count >= 6
    add = tally("kills before a file operation of a save that left a whole state", count)
    for die_at in range(1, count + 1):
        folder = prepare(f"killed-{die_at}")
        child = in_child(lambda f=folder, n=die_at: save_and_count(f, 3, place, n))
        assert wait_for(child) == -signal.SIGKILL
        heard = Listener()
        state = read_newest_checkpoint(folder, heard)
        assert state.step in (2, 3) and not heard.all("alarm"), die_at
        assert torch.equal(state.trained["w"], torch.full((8, 8), float(state.step)))
        write_checkpoint(folder, make_state(4))
        assert read_newest_checkpoint(folder, heard).step == 4
        assert not [p for p in Path(folder).iterdir() if p.name.startswith(".")], die_at
        add()
