"""What travels with exported weights: a card for people and hashes with lineage for machines.

    README.md       what this is, from which base and adapter, how to run it
    lorakeet.json   SHA-256 of every file, and where the weights come from

A safetensors file has no checksum, so a flipped bit in its data loads silently;
``verify_bundle`` finds it through the hashes.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from lorakeet.base.errors import FileFormatError
from lorakeet.base.run_folder import read_json, sha256_file, sha256_folder, write_json, write_text
from lorakeet.base.units import to_readable_bytes, to_readable_count

MANIFEST = "lorakeet.json"
FORMAT_VERSION = 1
_PACKAGES = ("lorakeet", "torch", "transformers", "safetensors")


def build_lineage(base: str, base_folder: Path, adapter_folder: Path) -> dict[str, Any]:
    """Where merged weights come from: names and content hashes of base and adapter.

    Args:
        base: as the user named it.
        base_folder: where its files lie.
    """
    adapter_manifest = adapter_folder / MANIFEST
    return {
        "base": base,
        "base_weights_sha256": {
            path.name: sha256_file(path) for path in sorted(base_folder.glob("*.safetensors"))
        },
        "adapter_sha256": sha256_folder(adapter_folder),
        "adapter": read_json(adapter_manifest) if adapter_manifest.exists() else None,
        "packages": {name: version_of(name) for name in _PACKAGES},
    }


def version_of(package: str) -> str:
    """An installed package's version, or ``unknown``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def write_card(folder: Path, *, facts: dict[str, Any]) -> None:
    """README.md in the Hub's form: a YAML head and how to run the model.

    Args:
        facts: ``base``, ``parameters``, ``dtype``, ``bytes``, ``adapter_sha256``.
    """
    # JSON is YAML too, which keeps odd characters of a path from ending the head early.
    base = orjson.dumps(facts["base"]).decode()
    card = f"""---
base_model: {base}
library_name: transformers
tags: [lorakeet, merged]
---

# {folder.name}

{facts["base"]} with a LoRA adapter merged into its weights by Lorakeet.

| | |
|---|---|
| parameters | {to_readable_count(facts["parameters"])} ({facts["parameters"]:,}) |
| weights | {facts["dtype"]}, {to_readable_bytes(facts["bytes"])} |
| adapter | SHA-256 `{facts["adapter_sha256"][:16]}` |

The merged files were read back by a fresh process and compared with base +
adapter before this folder was put in place; `merge.json` holds the figures.

```python
from transformers import pipeline

answer = pipeline("text-generation", model="{folder.name}")
```
"""
    write_text(folder / "README.md", card)


def write_manifest(folder: Path, *, lineage: dict[str, Any]) -> dict[str, str]:
    """``lorakeet.json``: SHA-256 and size of every other file, and the lineage.

    Returns:
        the hashes by file name.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "kind": "merged",
            "files": {name: {"sha256": hashes[name], "bytes": sizes[name]} for name in hashes},
            "lineage": lineage,
        },
    )
    return hashes


def verify_bundle(folder: Path) -> dict[str, str]:
    """The hashes of an exported folder, when every file is as it was written.

    Raises:
        FileFormatError: files are missing, changed or of another length; all are named.
    """
    files = read_json(folder / MANIFEST).get("files", {})
    problems = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}")
        elif sha256_file(path) != entry["sha256"]:
            problems.append(f"{name} has changed (another SHA-256)")
    if problems:
        raise FileFormatError(
            f"{folder}: {'; '.join(problems)}. The folder is damaged: merge again."
        )
    return {name: entry["sha256"] for name, entry in files.items()}
