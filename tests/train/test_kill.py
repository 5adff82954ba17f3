"""SIGKILL at any moment: the run is resumed and ends with the bytes of an undisturbed one.

A child is forked for each attempt, so an attempt costs no imports.  The seeds are
fixed; the moments follow from them and from this machine's speed.  ``pytest -m slow``
makes 12 trials; LORAKEET_KILL_TRIALS=200 asks for more.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from lorakeet.api.training import resume, train
from lorakeet.base.run_folder import RunFolder, sha256_file
from lorakeet.models.load import load_model
from lorakeet.train.checkpoint import Checkpoint, read_newest_checkpoint, write_checkpoint
from tests.train.runs import Listener

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

QUICK_TRIALS, SLOW_TRIALS, MAX_TRIALS, MAX_KILLS = 2, 12, 200, 3
STEPS = 6


def in_child(work):
    """Forks a child that does the work and ends without the parent's clean-up."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        torch.set_num_threads(
            1
        )  # torch renews its pool after a fork, and not for two threads at once
        work()
        code = 0
    finally:
        os._exit(code)


def wait_for(number):
    """0 when the child ended well, else how it ended."""
    return os.waitpid(number, 0)[1]


class KillBench:
    """An undisturbed run, its digest and its duration, and trials beside it."""

    def __init__(self, folder):
        self.folder = folder
        rows = [{"question": f"How many sails has boat {n}?", "answer": "sail " * (n % 5 + 1)}
                for n in range(24)]  # fmt: skip
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.recipe = {
            "base": "starter",
            "data": {"train": str(folder / "rows.jsonl"), "max_tokens": 64, "validation": 0.2},
            "method": {"rank": 2, "dropout": 0.1},
            "train": {"max_steps": STEPS, "epochs": 9, "batch_size": 4, "learning_rate": 1e-3,
                      "checkpoint_every_steps": 1, "evaluate_every_steps": 5},
        }  # fmt: skip
        load_model("starter")  # the imports, once for all children
        started_s = time.monotonic()
        assert wait_for(self.start(folder / "whole")) == 0
        self.duration_s = time.monotonic() - started_s
        self.digest = digest_of(folder / "whole")

    def start(self, run):
        """A child that trains, or goes on with what is there."""
        has_run = RunFolder(run).events.exists()
        return in_child(lambda: resume(run) if has_run else train(self.recipe, run))

    def run_trial(self, trial):
        """Kills up to three times, then lets the run end; returns where the kills fell."""
        draw, run, kills = random.Random(trial), self.folder / f"trial-{trial}", []
        for _ in range(draw.randint(1, MAX_KILLS)):
            child = self.start(run)
            time.sleep(draw.uniform(0, 1.1 * self.duration_s))
            os.kill(child, signal.SIGKILL)  # one that has ended waits to be collected
            wait_for(child)
            kills.append(sorted(path.name for path in run.rglob("step-*")))
        assert wait_for(self.start(run)) == 0, (trial, kills)
        assert digest_of(run) == self.digest, (trial, kills)
        assert not [*run.rglob("*.tmp"), *run.rglob("*.old")], (trial, kills)
        return kills


def digest_of(run):
    return sha256_file(RunFolder(run).adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    yield KillBench(tmp_path_factory.mktemp("kill"))
    if before is None:
        del os.environ["TOKENIZERS_PARALLELISM"]


@pytest.mark.parametrize("trial", range(QUICK_TRIALS))
def test_a_killed_run_ends_with_the_same_bytes(trial, bench):
    bench.run_trial(trial)


@pytest.mark.slow
@pytest.mark.timeout(MAX_TRIALS * 30)
def test_many_killed_runs_end_with_the_same_bytes(bench, tally):
    asked = min(int(os.environ.get("LORAKEET_KILL_TRIALS", SLOW_TRIALS)), MAX_TRIALS)
    add = tally("runs killed up to three times that ended with the undisturbed bytes", asked)
    for trial in range(1000, 1000 + asked):
        bench.run_trial(trial)
        add()


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
        assert wait_for(child) == signal.SIGKILL
        heard = Listener()
        state = read_newest_checkpoint(folder, heard)
        assert state.step in (2, 3) and not heard.all("alarm"), die_at
        assert torch.equal(state.trained["w"], torch.full((8, 8), float(state.step)))
        write_checkpoint(folder, make_state(4))
        assert read_newest_checkpoint(folder, heard).step == 4
        assert not [p for p in Path(folder).iterdir() if p.name.startswith(".")], die_at
        add()
