"""A checkpoint is whole or it is not there; nothing damaged is ever taken up."""

import shutil
import subprocess
import sys

import pytest
import torch

from lorakeet.base.errors import FileFormatError
from lorakeet.train import checkpoint
from lorakeet.train.checkpoint import (
    Checkpoint,
    collect_state,
    read_newest_checkpoint,
    restore_state,
    write_checkpoint,
)
from tests.train.runs import Listener, digest_of, make_model


def make_state(step, value=1.0, best=None):
    tensor = torch.full((3, 4), value)
    return Checkpoint(
        step=step, trained={"w": tensor}, moments={"w|step": torch.tensor(2.0)},
        best=best or {}, progress={"looks_since": step},
    )  # fmt: skip


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path):
    write_checkpoint(tmp_path, make_state(7, 1 / 3, best={"w": torch.eye(2).T}))
    found = read_newest_checkpoint(tmp_path, Listener())
    assert found.step == 7 and found.progress == {"looks_since": 7}
    assert torch.equal(found.trained["w"], torch.full((3, 4), 1 / 3))
    assert torch.equal(found.best["w"], torch.eye(2)) and found.moments["w|step"] == 2


def test_the_two_newest_stay_and_leftovers_go(tmp_path):
    (tmp_path / ".step-000001.tmp").mkdir(parents=True)
    for step in (50, 100, 150, 1_000_000, 999_999):
        write_checkpoint(tmp_path, make_state(step))
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert read_newest_checkpoint(tmp_path, Listener()).step == 1_000_000


def test_the_same_step_is_replaced(tmp_path):
    for value in (1.0, 2.0):
        write_checkpoint(tmp_path, make_state(5, value))
    assert read_newest_checkpoint(tmp_path, Listener()).trained["w"][0, 0] == 2
    assert names(tmp_path) == ["step-000005"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "a flipped bit in the weights": lambda f: flip(f / "trained.safetensors"),
    "a flipped bit in the moments": lambda f: flip(f / "moments.safetensors"),
    "a flipped bit in the progress": lambda f: flip(f / "progress.json"),
    "a cut file": lambda f: (f / "best.safetensors").write_bytes(b""),
    "a missing file": lambda f: (f / "progress.json").unlink(),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "a manifest that is a list": lambda f: (f / "manifest.json").write_text("[]"),
    "a manifest of nothing": lambda f: (f / "manifest.json").write_text('{"format": 1}'),
    "another format": lambda f: (f / "manifest.json").write_text('{"format": 9}'),
    "an empty folder": lambda f: [p.unlink() for p in f.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_older_one_taken_with_an_alarm(damage, tmp_path):
    for step in (50, 100):
        write_checkpoint(tmp_path, make_state(step))
    DAMAGES[damage](tmp_path / "step-000100")
    heard = Listener()
    assert read_newest_checkpoint(tmp_path, heard).step == 50
    (alarm,) = heard.all("alarm")
    assert alarm["code"] == "damaged-checkpoint" and "step-000100" in alarm["message"]


def test_no_folder_is_no_checkpoint(tmp_path):
    assert read_newest_checkpoint(tmp_path / "none", Listener()) is None


@pytest.mark.parametrize("place", ["save_file", "_write_manifest", "_publish"])
def test_a_crash_at_any_point_leaves_the_older_checkpoint(place, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, make_state(50))

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, place, cut)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, make_state(100))
    monkeypatch.undo()
    assert read_newest_checkpoint(tmp_path, Listener()).step == 50
    write_checkpoint(tmp_path, make_state(150))
    assert names(tmp_path) == ["step-000050", "step-000150"]


def test_a_full_disk_is_said_and_the_older_checkpoint_stays(tmp_path):
    write_checkpoint(tmp_path, make_state(50))
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from lorakeet.train.checkpoint import Checkpoint, write_checkpoint\n"
        "from lorakeet.base.errors import MachineError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "state = Checkpoint(step=100, trained={'w': torch.ones(10000)}, moments={}, best={},"
        " progress={})\n"
        "try: write_checkpoint(Path(sys.argv[1]), state)\n"
        "except MachineError as error: print('said', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("said"), done.stderr
    assert names(tmp_path) == ["step-000050"]


def test_weights_return_and_other_recipes_are_refused():
    model = make_model()
    before, state = digest_of(model), collect_state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    restore_state(model, state)
    assert digest_of(model) == before
    name = next(iter(state))
    with pytest.raises(FileFormatError, match="other parameters"):
        restore_state(model, {k: v for k, v in state.items() if k != name})
    with pytest.raises(FileFormatError, match="shape"):
        restore_state(model, state | {name: torch.ones(1)})


def test_a_folder_can_move(tmp_path):
    write_checkpoint(tmp_path / "a", make_state(3))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert read_newest_checkpoint(tmp_path / "b", Listener()).step == 3
