"""``verify adapter``: an adapter folder is whole, finite, belongs to its base and answers.

bytes       SHA-256 of every file as ``lorakeet.json`` recorded it
base        the adapter names one, and it holds the bytes that were trained on
numbers     every tensor is finite and fits the base (read strictly)
answers     read into the base, then from a copy that Lorakeet wrote: the logits of
            fixed prompts are equal bit for bit, and after detaching the base's too
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lorakeet.api.resolve import read_installed_versions
from lorakeet.base.errors import FileFormatError, LorakeetError
from lorakeet.base.proofs import Proof, find_excess, write_proof
from lorakeet.base.run_folder import RunFolder, read_json

LIMITS = {"max_logit_difference": 0.0, "max_base_difference": 0.0}


def verify_adapter(path: str | Path, *, base: str | None = None) -> Proof:
    """Checks an adapter folder, or the adapter of a run folder.

    Args:
        base: instead of the base that the adapter names, such as a copy at another place.

    Guarantees: a folder that cannot be read fails the proof with the reason; the proof
    is written where the adapter lies in a run folder.
    """
    place = Path(path)
    folder = place / "adapter" if (place / "adapter").is_dir() else place
    figures: dict[str, Any] = {}
    problems: list[str] = []
    notes: list[str] = []
    try:
        named = base or _read_base_name(folder)
        notes, problems = _check_lineage(folder, named)
        figures = _compare_answers(folder, named)
        problems += find_excess(figures, LIMITS)
    except LorakeetError as error:
        problems.append(str(error))
    proof = Proof(
        name="adapter",
        compared="the adapter's files with their manifest, and its answers with those of a copy "
        "that was written and read again",
        figures=figures, tolerances=LIMITS, problems=tuple(problems), notes=tuple(notes),
        versions=read_installed_versions(),
    )  # fmt: skip
    if (folder.parent / "resolved.yaml").is_file():
        write_proof(RunFolder(folder.parent), proof)
    return proof


def _read_base_name(folder: Path) -> str:
    from lorakeet.adapters.files import read_adapter_config

    named = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise FileFormatError(
            f"{folder}: adapter_config.json names no base (base_model_name_or_path). Give the "
            "base that it was trained on with --base."
        )
    return named


def _check_lineage(folder: Path, base: str) -> tuple[list[str], list[str]]:
    """Notes on what cannot be checked, and problems: the base has other bytes.

    The hashes of the adapter's own files are compared when it is read.
    """
    from lorakeet.models.base_hash import KEY, OLD_KEY, is_other_base
    from lorakeet.models.load import resolve_base

    manifest = folder / "lorakeet.json"
    if not manifest.is_file():
        return ["There is no lorakeet.json, so the bytes could not be compared with hashes."], []
    content = read_json(manifest)
    if not isinstance(content, dict) or not {KEY, OLD_KEY} & content.keys():
        return ["lorakeet.json holds no hash of the base, so the base was not compared."], []
    if is_other_base(content, resolve_base(base)):
        return [], [
            f"the base {base} has other bytes than the one that the adapter was trained on. Use "
            "the same version of the base."
        ]
    return [], []


def _compare_answers(folder: Path, base: str) -> dict[str, Any]:
    """Answers of base, adapter, and a copy of the adapter; the judged figures first."""
    from lorakeet.adapters.attach import detach
    from lorakeet.adapters.files import read_adapter, write_adapter
    from lorakeet.export.compare import compare_outputs
    from lorakeet.export.fresh import measure_outputs
    from lorakeet.export.merged import request_for
    from lorakeet.models.load import load_model
    from lorakeet.models.trained_form import read_trained_form

    request = request_for(folder)
    model, tokenizer = load_model(
        base, task=request.task, label_names=request.label_names,
        quantization=read_trained_form([folder]),
    )  # fmt: skip
    plain = measure_outputs(model, tokenizer, request)
    read_adapter(model, folder)
    tuned = measure_outputs(model, tokenizer, request)
    with tempfile.TemporaryDirectory(prefix="lorakeet-verify-") as place:
        copy = write_adapter(model, Path(place) / "adapter", base=base)
        detach(model)
        after = measure_outputs(model, tokenizer, request)
        read_adapter(model, copy)
        again = measure_outputs(model, tokenizer, request)
    return {
        "max_logit_difference": compare_outputs(tuned, again)["max_logit_difference"],
        "max_base_difference": compare_outputs(plain, after)["max_logit_difference"],
        "effect_on_logits": compare_outputs(plain, tuned)["max_logit_difference"],
        "num_positions": sum(len(one) for one in tuned.logits),
    }
