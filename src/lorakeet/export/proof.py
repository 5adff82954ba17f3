"""The proof of a merge: written files compared with what they must hold and answer."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorakeet.adapters.targets import ends_with
from lorakeet.export.compare import TOLERANCES, compare_outputs, find_problems
from lorakeet.export.fresh import (
    FreshRequest,
    Outputs,
    read_outputs,
    run_fresh,
    sha256_stored_tensors,
)
from lorakeet.models.weight_files import find_tensors

HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class MergeProof:
    """What was compared and what was found.

    Args:
        figures: measured differences by name.
        tolerances: what each may be at most (or at least), by name.
        hashes: SHA-256 of every written file, by name.
        problems: one sentence for each figure outside its tolerance.
    """

    name: str = "merge"
    passed: bool
    dtype: str
    figures: dict[str, Any]
    tolerances: dict[str, Any]
    hashes: dict[str, str]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Written:
    """A merged model on disk that nobody has checked yet, and what it must answer.

    Args:
        expected: answers of base + adapter, before the merge; None when nobody measured them.
        digests: of each merged tensor in memory, by name.
    """

    folder: Path
    dtype: torch.dtype
    request: FreshRequest
    expected: Outputs | None
    digests: dict[str, str]
    hashes: dict[str, str]


def verify_merged(written: Written, *, base_folder: Path | None = None) -> MergeProof:
    """Compares files with what they must answer, in a process that sees only the files.

    Args:
        base_folder: tells whether the head got a weight of its own, the figure ``head_untied``.

    Raises:
        MachineError: the child was killed or did not end within an hour.
    """
    limits = TOLERANCES[written.dtype]
    figures: dict[str, Any] = {}
    message, found, digests = "", None, {}
    if written.expected is None:
        digests = sha256_stored_tensors(written.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="lorakeet-proof-") as place:
            message = run_fresh(written.folder, written.request, Path(place))
            if not message:
                found, digests = read_outputs(Path(place) / "answer")
    problems = [f"a fresh process cannot read it ({message})"] if message else []
    if found:
        figures = compare_outputs(written.expected, found)
        problems = find_problems(figures, limits)
    if not message:
        names = written.digests.keys() | digests.keys()
        changed = sorted(n for n in names if written.digests.get(n) != digests.get(n))
        figures |= {"num_tensors": len(digests), "num_changed_tensors": len(changed)}
        if changed:
            problems.append(
                f"{len(changed)} tensors on disk are not those in memory, such as {changed[0]}"
            )
    if base_folder and HEAD in written.digests:
        names = find_tensors(base_folder)
        figures["head_untied"] = not any(ends_with(name, HEAD) for name in names)
    return MergeProof(
        passed=not problems,
        dtype=str(written.dtype).removeprefix("torch."),
        figures=figures,
        tolerances=asdict(limits),
        hashes=written.hashes,
        problems=tuple(problems),
    )
