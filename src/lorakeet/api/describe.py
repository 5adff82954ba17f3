"""What a folder tells about itself: the one source of every row of the registry.

resolved.yaml, recipe.yaml    settings, base, hashes of base and data
events.jsonl                  state, times, steps, the best validation
evaluation.json               scores of base and tuned model
lorakeet.json                 hashes of the results, parents
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakeet.base.errors import DataError
from lorakeet.base.events import read_events
from lorakeet.base.recipe_file import read_yaml
from lorakeet.base.registry import Entry
from lorakeet.base.run_folder import RunFolder, read_json, sha256_file

LINEAGE = "lorakeet.json"
_ENDS = {
    "run_finished": "finished", "run_interrupted": "interrupted", "run_failed": "failed",
}  # fmt: skip


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, whole or begun."""
    return (folder / "events.jsonl").is_file() and (
        (folder / "resolved.yaml").is_file() or (folder / "recipe.yaml").is_file()
    )


def is_result(folder: Path) -> bool:
    """Whether a folder holds an adapter or a model of ours."""
    return (folder / LINEAGE).is_file() or (folder / "adapter_config.json").is_file()


def describe(folder: Path) -> Entry:
    """The row of a run, an adapter or a merged model.

    Raises:
        DataError: one of its files is damaged.
    """
    return _describe_run(RunFolder(folder)) if is_run(folder) else _describe_result(folder)


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names.

    >>> flatten({"train": {"seed": 0, "stop": {}}, "base": "b"})
    {'train.seed': 0, 'train.stop': {}, 'base': 'b'}
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {
            name: list(value) if isinstance(value, (list, tuple)) else value
        }  # fmt: skip
    return flat


def _describe_run(run: RunFolder) -> Entry:
    """A run's row, from its files alone."""
    resolved = read_yaml(run.resolved) if run.resolved.is_file() else {}
    asked = resolved.get("recipe") or (read_yaml(run.recipe) if run.recipe.is_file() else {})
    events = read_events(run.events)
    end = next((e for e in reversed(events) if _state_of(e)), {})
    state = _state_of(end) or "running"
    done = next((e for e in reversed(events) if e["kind"] == "run_finished"), {})
    steps = [e["step"] for e in events if e["kind"] in ("step", "run_interrupted")]
    method = asked.get("method") or {}
    return Entry(
        folder=run.path, kind="run", state=state, base=str(asked.get("base", "")),
        method=_name_method(method), steps=done.get("steps") or max(steps, default=0),
        created=events[0]["time"] if events else None, finished=end.get("time"),
        settings=flatten(asked), hashes=_hashes_of_run(run, resolved),
        scores=dict(_scores_of(run, done)), parents=_parents_of_run(run, asked, resolved),
        problem=str(end.get("message", "")) if state == "failed" else "",
    )  # fmt: skip


def _state_of(event: Mapping[str, Any]) -> str:
    """The state that an event begins; empty for one that changes none."""
    kind = event.get("kind", "")
    is_start = kind == "run_started" or (kind == "stage_started" and event.get("stage") == "data")
    return "running" if is_start else _ENDS.get(kind, "")


def _name_method(method: Mapping[str, Any]) -> str:
    """``lora r=16`` and its like, with what is switched on."""
    kind = str(method.get("kind", "lora"))
    if kind == "full":
        return kind
    switched = [key for key in ("dora", "rslora", "adalora") if method.get(key)]
    return " ".join([kind, *switched, f"r={method.get('rank', '?')}"])


def _hashes_of_run(run: RunFolder, resolved: Mapping[str, Any]) -> dict[str, str]:
    """Base, data files and results by name."""
    known = resolved.get("hashes") or {}
    found = {"base": known["base"]} if known.get("base") else {}
    data = (known.get("data") or {}).get("files") or {}
    found |= {f"data {name}": digest for name, digest in data.items()}
    for place in (run.adapter, run.model, run.merged):
        if is_result(place):
            found |= {f"{place.name}/{k}": v for k, v in _hashes_of_result(place).items()}
    return found


def _hashes_of_result(folder: Path) -> dict[str, str]:
    """SHA-256 of the weight files, as the manifest has them or measured."""
    listed = read_json(folder / LINEAGE).get("files") if (folder / LINEAGE).is_file() else None
    if isinstance(listed, Mapping):
        pairs = {n: e.get("sha256", "") if isinstance(e, Mapping) else e for n, e in listed.items()}
        return {n: str(digest) for n, digest in pairs.items() if n.endswith(".safetensors")}
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}


def _scores_of(run: RunFolder, done: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The best validation, and what the evaluation found."""
    for name, value in (done.get("values") or {}).items():
        if value is not None:
            yield f"validation {name}", value
    found = read_json(run.evaluation) if run.evaluation.is_file() else {}
    for name, figure in (("domain", "accuracy"), ("general", "accuracy"),
                         ("perplexity", "perplexity")):  # fmt: skip
        for side in ("base", "tuned") if name in found else ():
            yield f"{name} {side}", found[name][side][figure]
    for figure in ("accuracy", "macro_f1") if "classification" in found else ():
        yield f"classification {figure}", found["classification"][figure]


def _parents_of_run(
    run: RunFolder, asked: Mapping[str, Any], resolved: Mapping[str, Any]
) -> tuple[dict[str, Any], ...]:
    """The run that was repeated, and a base that is itself a result of ours."""
    parents = []
    again = run.proofs / "rerun.json"
    if again.is_file() and (source := read_json(again).get("figures", {}).get("source")):
        parents.append({"folder": source, "relation": "rerun of"})
    base = Path(str(asked.get("base", "")))
    if base.is_dir() and is_result(base):
        digest = (resolved.get("hashes") or {}).get("base")
        parents.append({"folder": str(base), "sha256": digest, "relation": "trained on"})
    return tuple(parents)


def _describe_result(folder: Path) -> Entry:
    """An adapter's or a merged model's row."""
    if not is_result(folder):
        raise DataError(f"{folder}: holds neither a run nor an adapter or model of Lorakeet.")
    manifest = folder / LINEAGE
    lineage = read_json(manifest) if manifest.is_file() else {}
    is_adapter = (folder / "adapter_config.json").is_file()
    config = read_json(folder / "adapter_config.json") if is_adapter else {}
    inner = lineage.get("lineage") if isinstance(lineage.get("lineage"), Mapping) else lineage
    written = (manifest if manifest.is_file() else folder / "adapter_config.json").stat().st_mtime
    return Entry(
        folder=folder, kind="adapter" if is_adapter else "model", state="finished",
        base=str(inner.get("base") or config.get("base_model_name_or_path") or ""),
        method=f"lora r={config['r']}" if "r" in config else "", created=written,
        finished=written, hashes=_hashes_of_result(folder),
        parents=_parents_of_result(inner),
    )  # fmt: skip


def _parents_of_result(lineage: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The adapters that were combined, or the one that was merged."""
    parents = [
        {"folder": str(p.get("folder", "")), "relation": f"combined x {p.get('weight', 1)}",
         "sha256": next(iter((p.get("sha256") or {}).values()), None)}
        for p in lineage.get("parents") or () if isinstance(p, Mapping)
    ]  # fmt: skip
    merged = lineage.get("adapter")
    if isinstance(merged, Mapping):
        digest = (merged.get("files") or {}).get("adapter_model.safetensors")
        parents.append({"folder": "", "sha256": digest, "relation": "merged from"})
    return tuple(parents)
