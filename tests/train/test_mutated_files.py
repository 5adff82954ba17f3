"""Bit flips, truncations and swaps in checkpoints and adapters: every one is detected.

``pytest -m slow`` makes 1000 of each; the seeds are fixed.
"""

import random
import shutil

import pytest
import torch

from lorakeet.adapters.attach import adapter_names, adapter_parameters, attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.base.errors import FileFormatError
from lorakeet.train.checkpoint import Checkpoint, read_newest_checkpoint, write_checkpoint
from tests.train.runs import Listener, make_model

QUICK_TRIALS, SLOW_TRIALS = 60, 1000


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path, draw):
    """Two bytes at least: a JSON file without its last line end says the same."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) - 1)])


def swap_blocks(path, draw):
    """Two different stretches of a file change places, as blocks on a disk might."""
    content = path.read_bytes()
    size = draw.randint(1, len(content) // 3)
    first = draw.randrange(len(content) - 2 * size + 1)
    second = draw.randrange(first + size, len(content) - size + 1)
    parts = (content[:first], content[second:second + size], content[first + size:second],
             content[first:first + size], content[second + size:])  # fmt: skip
    changed = b"".join(parts)
    return flip(path, draw) if changed == content else path.write_bytes(changed)


def blank(path, draw):
    """A stretch of zeros, as a lost block leaves."""
    content = bytearray(path.read_bytes())
    first = draw.randrange(len(content))
    last = min(len(content), first + draw.randint(1, 512))
    if not any(content[first:last]):
        return flip(path, draw)
    content[first:last] = bytes(last - first)
    return path.write_bytes(content)


def take_from_other(path, draw, others):
    """The file of the same name from another state."""
    other = draw.choice(others) / path.name
    same = other.read_bytes() == path.read_bytes()
    return flip(path, draw) if same else shutil.copyfile(other, path)


MUTATIONS = (flip, flip, cut, swap_blocks, blank, take_from_other)


def mutate(folder, draw, others):
    """Changes one file of a folder; returns what was done, for the message of a failure."""
    path = draw.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    how = draw.choice(MUTATIONS)
    how(path, draw, others) if how is take_from_other else how(path, draw)
    return how.__name__, path.name


def make_state(step):
    draw = torch.Generator().manual_seed(step)
    tensors = {f"layer.{n}.w": torch.randn(6, 7, generator=draw) for n in range(3)}
    moments = {f"{name}|exp_avg": t * step for name, t in tensors.items()}
    return Checkpoint(
        step=step, trained=tensors, moments=moments, best={"w": torch.ones(2) * step},
        progress={"looks_since": step, "best_values": {"loss": 1 / step}},
    )  # fmt: skip


def harm_checkpoints(folder, trials, tally):
    """How many of the trials were detected, named, and answered with the state before."""
    write_checkpoint(folder / "whole", make_state(1))
    newest = write_checkpoint(folder / "whole", make_state(2))
    kept = folder / "kept"
    shutil.copytree(newest, kept)
    others = [folder / "whole" / "step-000001"]
    add = tally("mutated checkpoint files detected, with the state before taken up", trials)
    for trial in range(trials):
        draw = random.Random(f"checkpoint-{trial}")
        told = mutate(newest, draw, others)
        heard = Listener()
        found = read_newest_checkpoint(folder / "whole", heard)
        assert found is not None and found.step == 1, (trial, told)
        (alarm,) = heard.all("alarm")
        assert alarm["code"] == "damaged-checkpoint" and "step-000002" in alarm["message"], told
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
        add()
    assert read_newest_checkpoint(folder / "whole", Listener()).step == 2


def harm_adapters(folder, trials, tally):
    """The same for an adapter: refused by name, and the model stays as it was."""
    settings = Lora(rank=2, targets=("c_attn",))
    places = []
    for seed in (0, 1):
        model = make_model()
        attach(model, settings, seed=seed)
        with torch.no_grad():
            for parameter in adapter_parameters(model).values():
                parameter.add_(0.1 + seed)
        lineage = {"labels": [f"label {seed}"], "seed": seed}
        places.append(write_adapter(model, folder / f"a{seed}", base=f"b{seed}", lineage=lineage))
    whole, other = places
    model = make_model()
    add = tally("mutated adapter files refused", trials)
    for trial in range(trials):
        draw = random.Random(f"adapter-{trial}")
        place = folder / "harmed"
        shutil.copytree(whole, place)
        told = mutate(place, draw, [other])
        with pytest.raises(FileFormatError) as caught:
            read_adapter(model, place)
            raise AssertionError((trial, told))
        assert str(place) in str(caught.value) and not adapter_names(model), (trial, told)
        shutil.rmtree(place)
        add()
    read_adapter(model, whole)


@pytest.mark.parametrize("harm", [harm_checkpoints, harm_adapters])
def test_mutated_files_are_detected(harm, tmp_path, tally):
    harm(tmp_path, QUICK_TRIALS, tally)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [harm_checkpoints, harm_adapters])
def test_a_thousand_mutated_files_are_detected(harm, tmp_path, tally):
    harm(tmp_path, SLOW_TRIALS, tally)


def test_two_checkpoints_whose_names_were_swapped_are_no_states(tmp_path):
    one, two = (write_checkpoint(tmp_path, make_state(step)) for step in (1, 2))
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    heard = Listener()
    assert read_newest_checkpoint(tmp_path, heard) is None
    assert ["different steps" in alarm["message"] for alarm in heard.all("alarm")] == [True, True]


SHAPES = ("[]", "null", "3", '"text"', '{"format": 1, "files": []}',
          '{"format": 1, "files": {"trained.safetensors": 3}}')  # fmt: skip


@pytest.mark.parametrize("content", SHAPES)
def test_a_manifest_of_another_shape_is_damage_and_no_crash(content, tmp_path):
    write_checkpoint(tmp_path, make_state(1))
    (write_checkpoint(tmp_path, make_state(2)) / "manifest.json").write_text(content)
    assert read_newest_checkpoint(tmp_path, Listener()).step == 1
