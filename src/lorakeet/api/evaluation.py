"""Evaluate: the same questions to the base and to the tuned model, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakeet.api.resolve import recipe_of_run
from lorakeet.api.runs import record
from lorakeet.api.session import pad_id_of
from lorakeet.api.stages import open_sinks, stage
from lorakeet.base.errors import RequestError
from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.base.run_folder import RunFolder, write_json

EMBEDDED_SKILLS = Path(__file__).resolve().parents[1] / "embedded" / "skills.jsonl"


def evaluate(
    run: str | Path, *, emit: Emit | None = None, other_base: bool = False
) -> dict[str, Any]:
    """Scores of base and tuned model; written to the run's ``evaluation.json``.

    The domain questions and general skills of the recipe are asked of both; a
    classifier is scored on its validation rows, a language model's perplexity too.

    Args:
        other_base: takes a base with other weights than the adapter was trained on.

    Raises:
        DataError: the base is not the one that the adapter was trained on.
        FileFormatError: the folder holds no run, or no trained adapter.
        RequestError: the recipe names no questions and there is no validation data.
    """
    from lorakeet.evaluate.report import write_report
    from lorakeet.models.base_hash import check_base

    folder = RunFolder(Path(run))
    recipe = recipe_of_run(folder)
    if recipe.method.kind == "lora" and not other_base:
        check_base(folder.adapter, recipe.base)
    listen = open_sinks(folder, emit)
    with stage(listen, "evaluate"):
        result = _score_classifier(folder, recipe) if recipe.task == "classify" else {}
        if recipe.task != "classify":
            result = _score_language_model(folder, recipe, listen)
        if not result:
            raise RequestError(
                f"{folder.path}: nothing to evaluate on. Set evaluate.questions, "
                "evaluate.general or data.validation in the recipe."
            )
        write_json(folder.evaluation, result)
    write_report(folder)
    record(folder.path, listen)
    return result


def load_tuned(run: RunFolder, recipe: Recipe, *, label_names: tuple[str, ...] = ()) -> Any:
    """The base model with the run's adapter attached, or the fully tuned model.

    Returns:
        (model, tokenizer, is_adapter).
    """
    from lorakeet.adapters.files import read_adapter
    from lorakeet.models.load import load_model
    from lorakeet.models.templates import set_template

    if recipe.method.kind == "full":
        model, tokenizer = load_model(str(run.model), task=recipe.task, label_names=label_names)
        return model, tokenizer, False
    model, tokenizer = load_model(
        recipe.base, task=recipe.task, label_names=label_names, quantization=recipe.quantization
    )
    set_template(tokenizer, recipe.data.chat_template)
    read_adapter(model, run.adapter)
    return model, tokenizer, True


def _score_language_model(run: RunFolder, recipe: Recipe, emit: Emit) -> dict[str, Any]:
    """Questions and perplexity, base first."""
    from lorakeet.adapters.attach import no_adapter
    from lorakeet.models.load import load_model
    from lorakeet.models.templates import set_template

    model, tokenizer, is_adapter = load_tuned(run, recipe)
    tuned = _score_once(model, tokenizer, run, recipe, emit)
    if is_adapter:
        with no_adapter(model):
            base = _score_once(model, tokenizer, run, recipe, emit)
    else:
        base_model, base_tokenizer = load_model(recipe.base, task=recipe.task)
        set_template(base_tokenizer, recipe.data.chat_template)
        base = _score_once(base_model, base_tokenizer, run, recipe, emit)
    return _pair(base, tuned)


def _score_once(
    model: Any, tokenizer: Any, run: RunFolder, recipe: Recipe, emit: Emit
) -> dict[str, Any]:
    """Every score that one model gets; only what the recipe gives questions for."""
    from lorakeet.data.questions import read_questions
    from lorakeet.data.shards import ShardReader
    from lorakeet.evaluate.answers import score_answers
    from lorakeet.evaluate.batches import BatchLimit
    from lorakeet.evaluate.perplexity import measure_perplexity
    from lorakeet.infer.sampling import SamplingSettings

    settings = SamplingSettings(max_new_tokens=recipe.evaluate.max_new_tokens)
    scores: dict[str, Any] = {}
    for name, path in (
        ("domain", recipe.evaluate.questions),
        ("general", recipe.evaluate.general),
    ):
        if path:
            path = str(EMBEDDED_SKILLS) if path == "starter-skills" else path
            emit("progress", stage=f"evaluate {name}", done=0, total=1)
            scores[name] = asdict(score_answers(model, tokenizer, read_questions(path), settings))
    reader = ShardReader(run.data / "validation")
    if len(reader):
        pad_id = pad_id_of(tokenizer)
        scores["perplexity"] = BatchLimit(emit).measure(
            lambda size: measure_perplexity(model, reader, pad_id, size), reader
        )
    return scores


def _pair(base: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    """``{name: {"base":, "tuned":}}`` with what was forgotten told in words."""
    from lorakeet.evaluate.retention import compare_reports

    result: dict[str, Any] = {name: {"base": base[name], "tuned": tuned[name]} for name in tuned}
    if "general" in result:
        result["retention"] = compare_reports(base["general"], tuned["general"])
    return result


def _score_classifier(run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """The classification report on validation rows, with a confusion-matrix picture."""
    from lorakeet.base.run_folder import read_json
    from lorakeet.data.shards import ShardReader
    from lorakeet.evaluate.classify import measure_classification
    from lorakeet.evaluate.plots import has_matplotlib, write_confusion_picture

    labels = tuple(read_json(run.data_report)["label_names"])
    reader = ShardReader(run.data / "validation")
    if not len(reader):
        return {}
    model, tokenizer, _ = load_tuned(run, recipe, label_names=labels)
    report = measure_classification(
        model, reader, pad_id_of(tokenizer), labels, tokenizer=tokenizer
    )
    if has_matplotlib():
        write_confusion_picture(run.pictures / "confusion.png", report)
    return {"classification": asdict(report)}
