"""States are published in order beside the training; whatever goes wrong is raised, never lost."""

import errno
import threading

import pytest
import torch

from lorakeet.base.errors import BadBatchError, MachineError, NumericsError
from lorakeet.train import checkpoint, checkpoint_writer
from lorakeet.train.checkpoint import Checkpoint, read_newest_checkpoint
from lorakeet.train.checkpoint_writer import CheckpointWriter
from tests.train.runs import Listener, digest_of, make_job, make_recipe, run_job


def make_state(step, value=1.0):
    tensor = torch.full((3, 4), float(value))
    return Checkpoint(step=step, trained={"w": tensor}, moments={}, best={}, progress={})


class Gate:
    """Lets the writer go on only when it is opened, and remembers its order and threads."""

    def __init__(self, monkeypatch):
        self.open, self.begun = threading.Event(), threading.Event()
        self.steps, self.threads = [], set()
        honest = checkpoint.write_checkpoint

        def write(folder, state):
            self.begun.set()
            assert self.open.wait(60)
            self.steps.append(state.step)
            self.threads.add(threading.current_thread())
            return honest(folder, state)

        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", write)


def test_the_loop_goes_on_while_a_state_is_written_and_nothing_is_told_too_early(
    tmp_path, monkeypatch
):
    gate, heard = Gate(monkeypatch), Listener()
    with CheckpointWriter(tmp_path, heard) as writer:
        writer.hand_over(make_state(1))
        writer.hand_over(make_state(2))
        assert gate.begun.wait(60)
        writer.tell()
        assert not heard.all("checkpoint") and not list(tmp_path.glob("step-*"))
        gate.open.set()
    assert [event["step"] for event in heard.all("checkpoint")] == [1, 2]
    assert read_newest_checkpoint(tmp_path, heard).step == 2


def test_many_states_are_published_in_order_by_one_thread(tmp_path, monkeypatch):
    gate, heard = Gate(monkeypatch), Listener()
    gate.open.set()
    with CheckpointWriter(tmp_path, heard) as writer:
        for step in range(1, 21):
            writer.hand_over(make_state(step))
    assert gate.steps == [event["step"] for event in heard.all("checkpoint")]
    assert gate.steps == list(range(1, 21))
    assert len(gate.threads) == 1 and threading.main_thread() not in gate.threads


@pytest.mark.parametrize(("limit", "held"), [(2**30, 2), (0, 1)])
def test_no_more_states_are_held_than_memory_should_bear(limit, held, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "LARGE_BYTES", limit)
    gate, done = Gate(monkeypatch), []
    writer = CheckpointWriter(tmp_path, Listener())

    def hand_over_four():
        for step in range(1, 5):
            writer.hand_over(make_state(step))
            done.append(step)

    loop = threading.Thread(target=hand_over_four)
    loop.start()
    assert gate.begun.wait(60)
    loop.join(0.3)
    assert loop.is_alive() and done == list(range(1, held + 1))
    gate.open.set()
    loop.join(60)
    with writer:
        pass
    assert done == [1, 2, 3, 4] and gate.steps == [1, 2, 3, 4]


def break_disk(monkeypatch, from_step):
    """Every flush of a checkpoint from this step on finds the disk full."""
    honest = checkpoint._write_manifest

    def write(folder, step):
        if step >= from_step:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(folder, step)

    monkeypatch.setattr(checkpoint, "_write_manifest", write)


def test_a_full_disk_ends_the_run_and_the_older_state_loads(tmp_path, monkeypatch):
    break_disk(monkeypatch, from_step=4)
    job = make_job(tmp_path, make_recipe("lora", checkpoint_every_steps=2))
    with pytest.raises(MachineError, match="the disk is full"):
        run_job(job)
    assert read_newest_checkpoint(job.run.checkpoints, Listener()).step == 2


def test_a_full_disk_at_the_last_step_is_raised_too(tmp_path, monkeypatch):
    break_disk(monkeypatch, from_step=9)
    job = make_job(tmp_path, make_recipe("lora", checkpoint_every_steps=3))
    with pytest.raises(MachineError, match="the disk is full"):
        run_job(job)
    assert read_newest_checkpoint(job.run.checkpoints, Listener()).step == 6


def test_a_state_with_nan_is_raised_at_the_end_and_never_written(tmp_path):
    with pytest.raises(NumericsError, match="after step 3"), \
            CheckpointWriter(tmp_path, Listener()) as writer:  # fmt: skip
        writer.hand_over(make_state(3, float("nan")))
    assert not list(tmp_path.glob("*"))


def test_an_error_of_the_loop_is_not_hidden_by_one_of_the_writer(tmp_path, monkeypatch):
    break_disk(monkeypatch, from_step=1)
    heard = Listener()
    with pytest.raises(BadBatchError, match="the loop's own"), \
            CheckpointWriter(tmp_path, heard) as writer:  # fmt: skip
        writer.hand_over(make_state(1))
        raise BadBatchError("the loop's own", rows=[])
    (alarm,) = heard.all("alarm")
    assert alarm["code"] == "checkpoint" and "disk is full" in alarm["message"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_state_is_that_of_its_step_however_late_it_is_written(kind, tmp_path, monkeypatch):
    """The writer waits until the weights have moved on; what it writes must not have moved."""
    gate = Gate(monkeypatch)
    job = make_job(tmp_path / "slow", make_recipe(kind, checkpoint_every_steps=1, epochs=0.67))
    opened_at = []

    def stop():
        if not gate.open.is_set():
            opened_at.append(digest_of(job.model))
            if len(opened_at) == 2:
                gate.open.set()
        return False

    from lorakeet.train.fit import train_model
    from tests.train.runs import measured

    train_model(job, emit=Listener(), validate=measured(job), stop_requested=stop)
    assert opened_at[0] != opened_at[1]
    late = {p.name: (p / "trained.safetensors").read_bytes()
            for p in job.run.checkpoints.glob("step-*")}  # fmt: skip
    monkeypatch.undo()
    again = make_job(tmp_path / "quick", make_recipe(kind, checkpoint_every_steps=1, epochs=0.67))
    run_job(again)
    quick = {p.name: (p / "trained.safetensors").read_bytes()
             for p in again.run.checkpoints.glob("step-*")}  # fmt: skip
    assert late == quick and set(late) == {"step-000001", "step-000002"}
