"""Stage stamps: a stage whose inputs have not changed is not run again.

A stamp holds one digest over everything that a stage reads.  It is written after
the stage's own files, so a stage that was cut off has none.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lorakeet.base.run_folder import RunFolder, read_json, write_json


def fingerprint(*inputs: Any) -> str:
    """One hex digest over plain values, in order.

    >>> fingerprint("a", 1) == fingerprint("a", 1), fingerprint("a", 1) == fingerprint("a", 2)
    (True, False)
    """
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_fresh(run: RunFolder, stage: str, digest: str) -> bool:
    """Whether a stage has already run on exactly these inputs."""
    path = _path_of(run, stage)
    return path.is_file() and read_json(path).get("inputs") == digest


def write_stamp(run: RunFolder, stage: str, digest: str) -> None:
    """Records that a stage has run on these inputs."""
    write_json(_path_of(run, stage), {"stage": stage, "inputs": digest})


def _path_of(run: RunFolder, stage: str) -> Path:
    """``stages/<name>.json``."""
    return run.path / "stages" / f"{stage}.json"
