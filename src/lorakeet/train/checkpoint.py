"""The state of a run on disk, published whole or not at all.

    .step-000200.tmp/   files written and flushed one by one
    manifest.json       size and SHA-256 of each file, written last
    rename              to step-000200: from here on the checkpoint exists
    retention           only then are older ones removed

Reading starts with the newest, verifies every hash, and falls back loudly.
Tensors are safetensors, the rest is JSON: nothing on disk can run code.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakeet.base.errors import FileFormatError, NumericsError
from lorakeet.base.events import Emit
from lorakeet.base.run_folder import read_json, sha256_file, to_disk_error

FORMAT = 1
KEPT = 2
_FILES = {"trained.safetensors", "moments.safetensors", "best.safetensors", "progress.json"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that a run goes on from.

    Args:
        trained: name -> trained tensor.
        moments: ``<name>|exp_avg`` and its like.
        best: trained tensors of the best validation; empty before the first.
        progress: plain values: early stopping, running loss, tokens.
    """

    step: int
    trained: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    progress: Mapping[str, Any]


def write_checkpoint(folder: Path, state: Checkpoint, *, num_kept: int = KEPT) -> Path:
    """Publishes a checkpoint as ``step-<number>`` and then removes the oldest.

    Args:
        folder: the run's ``checkpoints``.

    Raises:
        MachineError: the disk is full; older checkpoints are untouched.
        NumericsError: a tensor holds NaN or infinity, which is never written.
    """
    final = folder / f"step-{state.step:06d}"
    beside = folder / f".{final.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    tensors = {"trained": state.trained, "moments": state.moments, "best": state.best}
    _refuse_not_finite(tensors, state.step)
    needed = count_bytes(state)
    try:
        folder.mkdir(exist_ok=True)  # not its parents: a vanished disk is not made anew elsewhere
        beside.mkdir()
        for name, group in tensors.items():
            _save(group, beside / f"{name}.safetensors")
        content = {"step": state.step, **state.progress}
        (beside / "progress.json").write_text(json.dumps(content), encoding="utf-8")
        _write_manifest(beside, state.step)
        _publish(beside, final)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise to_disk_error(error, final, needed) from error
    for older in (*_newest_first(folder)[num_kept:], *folder.glob(".step-*")):
        shutil.rmtree(older, ignore_errors=True)
    return final


def count_bytes(state: Checkpoint) -> int:
    """Bytes of all tensors of a state."""
    groups = (state.trained, state.moments, state.best)
    return sum(t.numel() * t.element_size() for group in groups for t in group.values())


def read_newest_checkpoint(folder: Path, emit: Emit) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written, or None.

    Damaged ones are passed over with an alarm that names the file.
    """
    for path in _newest_first(folder):
        try:
            return _read(path)
        except (FileFormatError, OSError) as error:
            emit("alarm", code="damaged-checkpoint", step=0, message=f"{error} Falling back.")
    return None


def collect_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every trained tensor by name, in the computer's own memory."""
    return {
        name: _copy(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def restore_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts trained tensors back, strictly.

    Raises:
        FileFormatError: names or shapes differ from what is trained.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[:3]
        raise FileFormatError(
            f"the checkpoint trains other parameters than the recipe (such as {', '.join(odd)}). "
            "Resume with the recipe that the run was started with."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise FileFormatError(
                    f"{name}: shape {tuple(tensors[name].shape)} in the checkpoint, "
                    f"{tuple(parameter.shape)} in the model. Resume with the run's own recipe."
                )
            parameter.copy_(tensors[name])


def collect_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of the optimiser's state by parameter name, in the computer's own memory."""
    return {
        f"{name}|{key}": _copy(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    """Puts the optimiser's state back where it keeps it."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, _, kind = key.rpartition("|")
        states.setdefault(name, {})[kind] = value
    for name, parameter in model.named_parameters():
        if "step" in states.get(name, {}):
            place = getattr(optimizer, "place_state", _to_parameter)
            optimizer.state[parameter] = {
                kind: place(value, parameter) for kind, value in states[name].items()
            }


def _to_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor on the device of its parameter."""
    return value.to(parameter.device)


def _copy(tensor: Tensor) -> Tensor:
    """The tensor as it is at this moment; a device's own memory is too dear for it."""
    return tensor.detach().to("cpu", copy=True)


def _read(path: Path) -> Checkpoint:
    """One checkpoint, every file verified against the manifest."""
    manifest = read_json(path / "manifest.json")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise FileFormatError(f"{path}: a checkpoint of format {found}, needed is {FORMAT}.")
    listed = manifest.get("files")
    if not isinstance(listed, dict) or listed.keys() != _FILES:
        raise FileFormatError(f"{path}: the manifest does not name the files of a checkpoint.")
    for name, entry in listed.items():
        file = path / name
        if not file.is_file():
            raise FileFormatError(f"{file}: missing.")
        if entry != _measure(file):
            raise FileFormatError(f"{file}: its bytes are not those that were written.")
    progress = read_json(path / "progress.json")
    if not manifest.get("step") == progress["step"] == _number_of(path):
        raise FileFormatError(f"{path}: folder, manifest and progress name different steps.")
    tensors = {
        name: load_file(path / f"{name}.safetensors") for name in ("trained", "moments", "best")
    }
    return Checkpoint(step=progress.pop("step"), progress=progress, **tensors)


def _refuse_not_finite(tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """A checkpoint is a state that one can go on from."""
    for kind, group in tensors.items():
        bad = [name for name, tensor in group.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise NumericsError(
                f"the state after step {step} ({kind}, {bad[0]} and {len(bad) - 1} more) holds NaN "
                "or infinity and is not written. Resume from the newest checkpoint, or start again "
                "with a lower train.learning_rate."
            )


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file; its library's error about a full disk becomes the usual one."""
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number)) from error


def _publish(beside: Path, final: Path) -> None:
    """Renames a finished folder into place; one of the same step steps aside until then."""
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.replace(aside)
    beside.replace(final)
    _flush_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _write_manifest(folder: Path, step: int) -> None:
    """Flushes every file, then writes and flushes the manifest over them."""
    files = {}
    for path in sorted(folder.iterdir()):
        _flush(path)
        files[path.name] = _measure(path)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
    _flush(manifest)
    _flush_folder(folder)


def _measure(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes names durable; Windows has no such call and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _newest_first(folder: Path) -> list[Path]:
    """Published checkpoints, the highest step first."""
    found: Iterator[Path] = folder.glob("step-*") if folder.is_dir() else iter(())
    numbered = {number: path for path in found if (number := _number_of(path)) is not None}
    return [numbered[step] for step in sorted(numbered, reverse=True)]


def _number_of(path: Path) -> int | None:
    """The step in a folder's name."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else None
