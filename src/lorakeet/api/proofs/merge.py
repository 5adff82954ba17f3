"""``verify merge``: base + adapter in one model answers like the two, from disk.

The merge is written beside the run, read by a fresh process and thrown away;
``lorakeet merge`` keeps it.  ``export.merged`` does both and leaves the figures.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

from lorakeet.api.resolve import read_installed_versions, read_resolved
from lorakeet.api.shipping import export_merged
from lorakeet.base.errors import MismatchError
from lorakeet.base.proofs import Proof, write_proof
from lorakeet.base.run_folder import RunFolder, read_json


def verify_merge(run: str | Path, *, dtype: str | None = None) -> Proof:
    """Merges into a temporary folder and compares answers from disk with base + adapter.

    Args:
        dtype: of the merged weights; None keeps the base's.

    Raises:
        RequestError: the run trained a whole model.
        FileFormatError: the folder holds no run.
        MachineError: the disk has too little room for one merged model.
    """
    folder = RunFolder(Path(run))
    read_resolved(folder)
    with tempfile.TemporaryDirectory(prefix=".verify-merge-", dir=folder.path) as place:
        try:
            found = asdict(export_merged(run, Path(place) / "merged", dtype=dtype))
        except MismatchError:
            found = read_json(folder.proofs / "merge.json")
    proof = Proof(
        name="merge",
        compared="base + adapter in memory with the merged model, read from disk by a fresh "
        "process",
        figures=found["figures"], tolerances=found["tolerances"],
        problems=tuple(found["problems"]), versions=read_installed_versions(),
    )  # fmt: skip
    write_proof(folder, proof)
    return proof
