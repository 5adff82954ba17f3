"""One model with its adapter in its weights, kept only when a fresh process agrees.

    base + adapter ── answers ──────────────────────────────┐
        │ W' = W + s B A, summed in float32                 compare ── proofs/merge.json
        └── temporary folder ── fresh process ── answers ───┘
                 │ equal: renamed to OUT          different: renamed to OUT.failed

Three things are proven: the files hold the merged tensors bit by bit (a digest of
each tensor before and after), the written tokenizer makes the same tokens, and
the model that any program loads from them answers like base + adapter.  OUT does
not exist before that, so nobody can use a model that was not compared.

Cost: the weights are streamed (``export.stream``), so the merge itself holds one tensor
at a time; the model is once in memory for its answers, here and then in the child.  The
proof ``tensors`` leaves the answers out.  A model that cannot be streamed (a classifier,
files that name their tensors otherwise) is merged in memory.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lorakeet.adapters.attach import detach
from lorakeet.adapters.files import read_adapter
from lorakeet.adapters.merge import merge
from lorakeet.base.errors import MachineError, MismatchError, RequestError
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.run_folder import read_json, to_disk_error, write_json
from lorakeet.export.bundle import build_lineage, write_card, write_manifest
from lorakeet.export.drift import measure_drift
from lorakeet.export.fresh import (
    FreshRequest,
    measure_outputs,
    sha256_stored_tensors,
    sha256_tensor,
)
from lorakeet.export.proof import MergeProof, Written, verify_merged
from lorakeet.export.stream import write_stream
from lorakeet.export.stream_plan import StreamPlan, plan_stream
from lorakeet.models.base_hash import check_adapter
from lorakeet.models.load import build_without_weights, load_model, read_tokenizer, resolve_base
from lorakeet.models.quiet import no_bars
from lorakeet.models.remote_code import copy_remote_code
from lorakeet.models.templates import adopt_template
from lorakeet.quant.convert import dequantize_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 4 * 1000**3
PROOFS = ("answers", "tensors")
BASES = ("full", "dequantised")
_NO_PLAN = StreamPlan(pieces=(), files={}, obstacles=("a classifier may have a new head",))
SPARE_BYTES = 32 * 1024**2  # tokenizer, card and what the file system keeps for itself


@dataclass(frozen=True, kw_only=True)
class MergeOrder:
    """What is merged, how it is written and how it is proven.

    Args:
        base: a folder, a Hub id or ``starter``.
        dtype: of the written weights; None keeps the base's own.
        proof: ``answers`` compares base + adapter with the files in a fresh process;
            ``tensors`` reads the written tensors back only, for models larger than memory.
        trained_on: how the base was held when the adapter was trained.
        into: ``full`` merges into the base's own weights, ``dequantised`` into the expanded
            ones that the adapter was trained on.
        other_base: takes a base with other weights than the adapter was trained on.
    """

    base: str
    adapter_folder: Path
    dtype: str | None = None
    proof: str = "answers"
    trained_on: QuantizationSettings = QuantizationSettings()
    into: str = "full"
    other_base: bool = False

    @property
    def form(self) -> QuantizationSettings:
        """How the base is held that the adapter is merged into."""
        return self.trained_on if self.into == "dequantised" else QuantizationSettings()


def write_merged(
    order: MergeOrder,
    out: Path,
    *,
    run_proofs: Path | None = None,
    after_write: Callable[[Path], None] | None = None,
) -> MergeProof:
    """Merges an adapter into its base, proves the files and puts them in place.

    Args:
        out: a folder that does not exist or is empty.
        run_proofs: a folder for ``merge.json``; the proof lies in ``out`` anyway.
        after_write: called with the folder between writing and proving.

    Raises:
        RequestError: ``out`` has files in it, the dtype or proof is unknown, or the model
            cannot be streamed and the proof asks for that.
        DataError: the base is not the one that the adapter was trained on.
        MachineError: the disk has too little room; nothing is left behind.
        MismatchError: the files answer differently; they lie in ``<out>.failed``.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out}: something is there already. Choose a new folder.")
    if order.into not in BASES or (order.into == "dequantised" and not order.trained_on.is_on):
        raise RequestError(
            f"into is '{order.into}'; known are {', '.join(BASES)}, and a base that was not "
            "quantised in training has full weights only."
        )
    if order.proof not in PROOFS:
        raise RequestError(f"proof is '{order.proof}'; known are {', '.join(PROOFS)}.")
    base = None if order.other_base else order.base
    check_adapter(Path(order.adapter_folder), base=base, held=order.form)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".writing", dir=out.parent))
    try:
        written = _write_files(order, folder)
        if after_write:
            after_write(folder)
        proof = verify_merged(written, base_folder=resolve_base(order.base))
        if order.form != order.trained_on and written.expected is not None:
            drift = measure_drift(order.base, order.adapter_folder, order.trained_on, written)
            proof = replace(proof, figures=proof.figures | drift)
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


def _write_files(order: MergeOrder, folder: Path) -> Written:
    """The merged model, its tokenizer, card and manifest in a folder; measured before merging."""
    base, adapter_folder = order.base, Path(order.adapter_folder)
    base_folder = resolve_base(base)
    request = request_for(adapter_folder)
    stored_as = _choose_dtype(order.dtype, base_folder)
    expected, model = None, None
    if order.proof == "answers":
        model, tokenizer = load_model(
            base, task=request.task, label_names=request.label_names, dtype="float32",
            quantization=order.form,
        )  # fmt: skip
        read_adapter(model, adapter_folder)
        expected = measure_outputs(model, tokenizer, request)
    else:
        tokenizer = read_tokenizer(base)
    adopt_template(tokenizer, adapter_folder)
    empty = None if request.task == "classify" else build_without_weights(base)
    plan = _plan(order, empty, stored_as)
    if plan.obstacles and model is None:
        raise RequestError(
            f"this merge cannot be streamed: {'; '.join(plan.obstacles)}. Merge with the proof "
            "'answers', which holds the whole model in memory."
        )
    try:
        if plan.obstacles:
            digests = _write_from_memory(model, folder, stored_as)
        else:
            model = empty
            gc.collect()
            _check_room(folder, plan.num_bytes)
            digests = write_stream(plan, folder, max_shard_bytes=MAX_SHARD_BYTES)
            _write_config(model, tokenizer, stored_as, (base_folder, folder))
        tokenizer.save_pretrained(folder)
        copy_remote_code(base_folder, folder)
    except OSError as error:
        raise to_disk_error(error, folder, plan.num_bytes) from error
    except SafetensorError as error:
        raise MachineError(
            f"{folder}: the weights cannot be written ({error}). Free some space and merge again."
        ) from error
    hashes = _write_papers(folder, model, build_lineage(base, base_folder, adapter_folder))
    del model
    gc.collect()
    return Written(
        folder=folder, dtype=stored_as, request=request, expected=expected,
        digests=digests, hashes=hashes,
    )  # fmt: skip


def _plan(order: MergeOrder, empty: Any, stored_as: torch.dtype) -> StreamPlan:
    """What would be streamed; a classifier never is."""
    if empty is None:
        return _NO_PLAN
    folder = resolve_base(order.base)
    return plan_stream(empty, folder, Path(order.adapter_folder), stored_as, form=order.form)


def _write_from_memory(model: Any, folder: Path, stored_as: torch.dtype) -> dict[str, str]:
    """Merges and writes a whole model that carries its adapter, as transformers names its parts."""
    dequantize_model(model)
    vars(model.config).pop("quantization_config", None)
    merge(model)
    detach(model)
    model.to(stored_as)
    _check_room(folder, sum(p.numel() * p.element_size() for p in model.parameters()))
    tensors = {name: sha256_tensor(tensor) for name, tensor in model.state_dict().items()}
    with no_bars():
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_BYTES)
    # save_pretrained leaves out the second name of a tied weight and may rename others.
    return {
        name: tensors.get(name, digest) for name, digest in sha256_stored_tensors(folder).items()
    }


def _write_config(
    model: Any, tokenizer: Any, stored_as: torch.dtype, folders: tuple[Path, Path]
) -> None:
    """The configuration beside streamed weights, as transformers would write it."""
    base_folder, folder = folders
    model.to(stored_as)
    config = model.config
    config.dtype, config.architectures = stored_as, [type(model).__name__]
    if config.pad_token_id is None and tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    if (base_folder / "generation_config.json").is_file():
        shutil.copyfile(base_folder / "generation_config.json", folder / "generation_config.json")


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
