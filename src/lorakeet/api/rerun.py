"""Rerun: the same recipe, base, data and versions leave the same bytes.

    resolved.yaml of RUN -> what differs? -> train into a new folder -> compare SHA-256

Other versions or another machine are named and go on, as they may round otherwise.
Another base or other data cannot give the same adapter and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakeet.api.proofs.data import find_changed_sources
from lorakeet.api.proofs.resume import sha256_weights
from lorakeet.api.resolve import (
    read_installed_versions,
    read_machine,
    read_resolved,
    recipe_of_run,
)
from lorakeet.api.runs import record
from lorakeet.api.training import train
from lorakeet.base.errors import DataError, FileFormatError
from lorakeet.base.events import Emit
from lorakeet.base.proofs import Proof, find_excess, write_proof
from lorakeet.base.run_folder import RunFolder, sha256_file, sha256_folder

LIMITS = {"num_different_files": 0}


def rerun(
    run: str | Path,
    into: str | Path,
    *,
    force: bool = False,
    emit: Emit | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Proof:
    """Trains a finished run again and compares the weights bit for bit.

    Args:
        into: a new folder, which gets the run and ``proofs/rerun.json``.
        force: train although base or data have other bytes.
        emit: hears every event; what differs comes first, as alarms.

    Raises:
        FileFormatError: the folder holds no finished run.
        DataError: base or data are not those of the run, and ``force`` is False.
        RequestError: ``into`` already holds a run.
        InterruptedRun: ``stop_requested`` said so; ``resume`` goes on without the comparison.
    """
    source = RunFolder(Path(run))
    resolved, recipe = read_resolved(source), recipe_of_run(source)
    expected = sha256_weights(_result_of(source))
    if not expected:
        raise FileFormatError(
            f"{source.path}: this run left no weights to compare with. 'lorakeet resume "
            f"{source.path}' finishes it."
        )
    notes = find_other_versions(resolved)
    changed = find_changed_inputs(resolved, recipe.base)
    if changed and not force:
        raise DataError(
            "\n".join(changed) + "\nThe same adapter cannot come of this. Put the old bytes back, "
            "or train anyway with --force."
        )
    for code, message in [("other-versions", n) for n in notes] + [
        ("other-data", c) for c in changed
    ]:
        if emit:
            emit("alarm", code=code, step=0, message=message)
    target = RunFolder(train(recipe, into, emit=emit, stop_requested=stop_requested).folder)
    found = sha256_weights(_result_of(target))
    proof = _compare(expected, found, notes=(*notes, *changed), source=source)
    write_proof(target, proof)
    record(target.path, emit or (lambda kind, /, **_: None))
    return proof


def find_other_versions(resolved: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence for each package, and each fact of the machine, that is not the run's."""
    told = []
    for part, present in (("versions", read_installed_versions()), ("machine", read_machine())):
        past = resolved.get(part) or {}
        told += [
            f"{name} was {past[name]} and is {value}; results may round otherwise."
            for name, value in present.items()
            if name in past and past[name] != value
        ]
    return tuple(told)


def find_changed_inputs(resolved: Mapping[str, Any], base: str) -> tuple[str, ...]:
    """A sentence for the base and for each data file whose bytes are not the run's."""
    from lorakeet.models.load import resolve_base

    hashes = resolved.get("hashes") or {}
    changed = []
    if hashes.get("base") != sha256_folder(resolve_base(base)):
        changed.append(f"base {base}: its bytes are not those that were trained on.")
    for parent in hashes.get("parents") or ():
        places = {Path(parent["folder"]) / file: past for file, past in parent["sha256"].items()}
        if any(not path.is_file() or sha256_file(path) != past for path, past in places.items()):
            changed.append(f"{parent['folder']}: this adapter is not the one that was continued.")
    files = (hashes.get("data") or {}).get("files") or {}
    return (*changed, *find_changed_sources(files))


def _result_of(run: RunFolder) -> Path:
    return run.adapter if run.adapter.is_dir() else run.model


def _compare(
    expected: Mapping[str, str], found: Mapping[str, str], *, notes: tuple[str, ...],
    source: RunFolder,
) -> Proof:  # fmt: skip
    """The verdict over the weights of both runs."""
    different = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    figures = {
        "num_different_files": len(different), "num_files": len(expected),
        "source": str(source.path.absolute()),
        "sha256_first": dict(expected), "sha256_again": dict(found),
    }  # fmt: skip
    return Proof(
        name="rerun",
        compared=f"the weights with those of {source.path}, bit for bit",
        figures=figures, tolerances=LIMITS, notes=notes,
        problems=(*find_excess(figures, LIMITS), *(f"{name} differs." for name in different)),
        versions=read_installed_versions(),
    )  # fmt: skip
