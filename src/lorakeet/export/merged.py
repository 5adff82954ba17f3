"""One model with its adapter in its weights, kept only when a fresh process agrees.

    base + adapter ── answers ──────────────────────────────┐
        │ W' = W + s B A, summed in float32                 compare ── proofs/merge.json
        └── temporary folder ── fresh process ── answers ───┘
                 │ equal: renamed to OUT          different: renamed to OUT.failed

Three things are proven: the files hold the merged tensors bit by bit (a digest of
each tensor before and after), the written tokenizer makes the same tokens, and
the model that any program loads from them answers like base + adapter.  OUT does
not exist before that, so nobody can use a model that was not compared.

Cost: the model once in memory here and once in the child, after this one is gone;
the size of the weights on disk.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lorakeet.adapters.attach import detach
from lorakeet.adapters.files import read_adapter
from lorakeet.adapters.merge import merge
from lorakeet.base.errors import MachineError, MismatchError, RequestError
from lorakeet.base.run_folder import read_json, to_disk_error, write_json
from lorakeet.export.bundle import build_lineage, write_card, write_manifest
from lorakeet.export.compare import TOLERANCES, compare_outputs, find_problems
from lorakeet.export.fresh import (
    FreshRequest,
    Outputs,
    measure_outputs,
    read_outputs,
    run_fresh,
    sha256_stored_tensors,
    sha256_tensor,
)
from lorakeet.models.load import load_model, resolve_base
from lorakeet.models.quiet import no_bars

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_SIZE = "4GB"
SPARE_BYTES = 32 * 1024**2  # tokenizer, card and what the file system keeps for itself


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
        expected: answers of base + adapter, before the merge.
        digests: of each merged tensor in memory, by name.
    """

    folder: Path
    dtype: torch.dtype
    request: FreshRequest
    expected: Outputs
    digests: dict[str, str]
    hashes: dict[str, str]


def write_merged(
    base: str,
    adapter_folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    run_proofs: Path | None = None,
    after_write: Callable[[Path], None] | None = None,
) -> MergeProof:
    """Merges an adapter into its base, proves the files and puts them in place.

    Args:
        base: a folder, a Hub id or ``starter``.
        out: a folder that does not exist or is empty.
        dtype: of the written weights; None keeps the base's own.
        run_proofs: a folder for ``merge.json``; the proof lies in ``out`` anyway.
        after_write: called with the folder between writing and proving.

    Raises:
        RequestError: ``out`` has files in it, or the dtype is unknown.
        MachineError: the disk has too little room; nothing is left behind.
        MismatchError: the files answer differently; they lie in ``<out>.failed``.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out}: something is there already. Choose a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".writing", dir=out.parent))
    try:
        written = _write_files(base, Path(adapter_folder), folder, dtype)
        if after_write:
            after_write(folder)
        proof = verify_merged(written)
        write_json(folder / "merge.json", asdict(proof))
        if run_proofs:
            write_json(Path(run_proofs) / "merge.json", asdict(proof))
        if not proof.passed:
            failed = _move_aside(folder, out)
            raise MismatchError(
                f"{out}: the merged model is not base + adapter: {'; '.join(proof.problems)}. "
                f"It was not put in place; {failed} keeps it for a look. Merge again, in float32 "
                "if 16 bits are too coarse."
            )
        if out.exists():
            out.rmdir()
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return proof


def verify_merged(written: Written) -> MergeProof:
    """Compares files with what they must answer, in a process that sees only the files.

    Raises:
        MachineError: the child was killed or did not end within an hour.
    """
    limits = TOLERANCES[written.dtype]
    with tempfile.TemporaryDirectory(prefix="lorakeet-proof-") as place:
        message = run_fresh(written.folder, written.request, Path(place))
        if message:
            figures: dict[str, Any] = {}
            problems = [f"a fresh process cannot read it ({message})"]
        else:
            found, digests = read_outputs(Path(place) / "answer")
            figures = compare_outputs(written.expected, found)
            changed = sorted(
                name
                for name in written.digests.keys() | digests.keys()
                if written.digests.get(name) != digests.get(name)
            )
            figures["num_tensors"] = len(digests)
            figures["num_changed_tensors"] = len(changed)
            problems = find_problems(figures, limits)
            if changed:
                problems.append(
                    f"{len(changed)} tensors on disk are not those in memory, such as {changed[0]}"
                )
    return MergeProof(
        passed=not problems,
        dtype=str(written.dtype).removeprefix("torch."),
        figures=figures,
        tolerances=asdict(limits),
        hashes=written.hashes,
        problems=tuple(problems),
    )


def _write_files(base: str, adapter_folder: Path, folder: Path, dtype: str | None) -> Written:
    """The merged model, its tokenizer, card and manifest in a folder; measured before merging."""
    base_folder = resolve_base(base)
    request = request_for(adapter_folder)
    model, tokenizer = load_model(
        base, task=request.task, label_names=request.label_names, dtype="float32"
    )
    stored_as = _choose_dtype(dtype, base_folder)
    read_adapter(model, adapter_folder)
    expected = measure_outputs(model, tokenizer, request)
    merge(model)
    detach(model)
    model.to(stored_as)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    _check_room(folder, num_bytes)
    tensors = {name: sha256_tensor(tensor) for name, tensor in model.state_dict().items()}
    try:
        with no_bars():
            model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise to_disk_error(error, folder, num_bytes) from error
    except SafetensorError as error:
        raise MachineError(
            f"{folder}: the weights cannot be written ({error}); they need {num_bytes:,} bytes. "
            "Free some space and merge again."
        ) from error
    # save_pretrained leaves out the second name of a tied weight and may rename others.
    digests = {
        name: tensors.get(name, digest) for name, digest in sha256_stored_tensors(folder).items()
    }
    hashes = _write_papers(folder, model, build_lineage(base, base_folder, adapter_folder))
    del model
    gc.collect()
    return Written(
        folder=folder, dtype=stored_as, request=request, expected=expected,
        digests=digests, hashes=hashes,
    )  # fmt: skip


def request_for(adapter_folder: Path) -> FreshRequest:
    """What to measure: an adapter of a classifier says so in its configuration."""
    kind = read_json(adapter_folder / "adapter_config.json").get("task_type")
    manifest = adapter_folder / "lorakeet.json"
    lineage = read_json(manifest) if manifest.exists() else {}
    if kind != "SEQ_CLS":
        return FreshRequest(task="chat")
    return FreshRequest(task="classify", label_names=tuple(lineage.get("labels") or ()))


def _choose_dtype(dtype: str | None, base_folder: Path) -> torch.dtype:
    """The asked dtype, or the one that the base is stored in."""
    if dtype is None:
        config = read_json(base_folder / "config.json")
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        return DTYPES.get(dtype, torch.float32)
    if dtype not in DTYPES:
        raise RequestError(f"dtype is '{dtype}'; known are {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        raise MachineError(
            f"{folder.parent}: the merged weights need {num_bytes + SPARE_BYTES:,} bytes and "
            f"{free:,} are free. Free some space or choose another folder."
        )


def _write_papers(folder: Path, model: Any, lineage: dict[str, Any]) -> dict[str, str]:
    """The card and the manifest; returns the hashes of all files."""
    parameters = list(model.parameters())
    facts = {
        "base": lineage["base"],
        "parameters": sum(one.numel() for one in parameters),
        "bytes": sum(one.numel() * one.element_size() for one in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "adapter_sha256": lineage["adapter_sha256"],
    }
    write_card(folder, facts=facts)
    return write_manifest(folder, lineage=lineage)


def _move_aside(folder: Path, out: Path) -> Path:
    """Renames a refused folder to ``<out>.failed``, or the first such name that is free."""
    number = 1
    failed = out.with_name(f"{out.name}.failed")
    while failed.exists():
        number += 1
        failed = out.with_name(f"{out.name}.failed-{number}")
    folder.rename(failed)
    return failed
