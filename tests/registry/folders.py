"""Run folders as the writers of the base floor leave them, without a model behind them."""

from __future__ import annotations

from lorakeet.base.events import EventLog
from lorakeet.base.recipe_file import recipe_from_dict, recipe_to_dict, to_yaml
from lorakeet.base.run_folder import RunFolder, write_json, write_text


def write_run(folder, *, state="finished", loss=1.5, base="starter", **train):
    """A run that has made three steps and ended as asked."""
    run = RunFolder(folder)
    recipe = recipe_to_dict(
        recipe_from_dict({"base": base, "data": {"train": "a.jsonl"}, "train": train})
    )
    log = EventLog(run.events)
    log.emit("run_started", recipe=recipe)
    write_text(run.recipe, to_yaml(recipe))
    write_text(run.resolved, to_yaml({"recipe": recipe, "hashes": {
        "base": "b" * 64, "data": {"files": {"a.jsonl": "d" * 64}}}}))  # fmt: skip
    for step in (1, 2, 3):
        log.emit("step", step=step, loss=loss)
    if state == "finished":
        log.emit("run_finished", steps=3, values={"loss": loss, "perplexity": 2 * loss})
        write_adapter_files(run.adapter)
    elif state == "interrupted":
        log.emit("run_interrupted", step=3)
    elif state == "failed":
        log.emit("run_failed", message="step 3: the loss is nan.")
    return folder


def write_adapter_files(folder, parents=(), digest="a" * 64):
    """An adapter's papers."""
    write_json(folder / "adapter_config.json", {"r": 4, "base_model_name_or_path": "starter"})
    write_json(folder / "lorakeet.json", {
        "base": "starter", "parents": list(parents),
        "files": {"adapter_model.safetensors": digest},
    })  # fmt: skip
