"""``lorakeet.json``: the hashes of an adapter's files, its lineage, and a seal over itself.

    files   SHA-256 of adapter_config.json and adapter_model.safetensors
    seal    SHA-256 of everything else in lorakeet.json, as JSON with sorted keys

A safetensors file has no checksum of its own, and a manifest that covers the others but
not itself would let its base or lineage change unseen.  PEFT writes no such file and
ignores it; an adapter without one is read without these checks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakeet.adapters.folders import LINEAGE
from lorakeet.base.run_folder import sha256_file, write_json

FORMAT = 2
_UNSEALED_FORMAT = 1


def write_manifest(
    folder: Path, files: Sequence[str], *, base: str | None, lineage: Mapping[str, Any]
) -> None:
    """Hashes the named files of a folder and writes ``lorakeet.json`` beside them."""
    hashes = {file: sha256_file(folder / file) for file in files}
    content = {**lineage, "format": FORMAT, "base": base, "files": hashes}
    write_json(folder / LINEAGE, seal(content))


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its own digest under ``seal``, over an older one.

    >>> sorted(seal({"base": "starter"}))
    ['base', 'seal']
    """
    rest = {key: value for key, value in content.items() if key != "seal"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=False)
    return {**rest, "seal": hashlib.sha256(text.encode()).hexdigest()}


def find_changed(folder: Path, content: Mapping[str, Any], needed: Sequence[str]) -> list[str]:
    """A sentence for each file, and for the manifest, that is not as it was written.

    Args:
        content: of ``lorakeet.json``; where there is no such file, nothing is found.
        needed: files that the manifest must list.
    """
    if not (folder / LINEAGE).is_file():
        return []
    is_sealed = content.get("format") == FORMAT and content.get("seal") == seal(content)["seal"]
    if not is_sealed and content.get("format") != _UNSEALED_FORMAT:
        return [f"{LINEAGE} is not as it was written (its seal differs)"]
    files = content.get("files")
    if not isinstance(files, dict) or not set(needed) <= files.keys():
        return [f"{LINEAGE} lists no hashes of {' and '.join(needed)}"]
    paths = {file: folder / Path(file).name for file in files}  # a name, never a way elsewhere
    return [
        f"{file} is not the file that was written (SHA-256 differs, or it is gone)"
        for file, path in paths.items()
        if not path.is_file() or sha256_file(path) != files[file]
    ]
