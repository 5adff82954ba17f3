"""A loaded run: model, tokenizer and data, and what is looked at while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakeet.base.errors import MachineError
from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import Validation
from lorakeet.base.run_folder import RunFolder

if TYPE_CHECKING:
    from lorakeet.evaluate.batches import BatchLimit


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything that the training stage needs, loaded."""

    recipe: Recipe
    run: RunFolder
    base_folder: Path
    model: Any
    tokenizer: Any
    data: Any
    emit: Emit


def open_session(
    recipe: Recipe, run: RunFolder, base_folder: Path, data: Any, emit: Emit
) -> Session:
    """The model with its method attached, ready to train.

    Args:
        data: ``data.prepare.PreparedData``.

    Raises:
        RequestError: the method does not fit the model.
        MachineError: the base cannot be loaded.
    """
    from lorakeet.models.heap import weights_apart
    from lorakeet.models.load import load_model
    from lorakeet.models.methods import apply_method
    from lorakeet.models.narrow import narrow_frozen
    from lorakeet.models.templates import set_template

    # small steps of full training would be lost in 16-bit weights, on a GPU too
    dtype = "float32" if recipe.method.kind == "full" else "auto"
    with weights_apart():
        model, tokenizer = load_model(
            recipe.base, task=recipe.task, label_names=data.label_names, dtype=dtype,
            quantization=recipe.quantization, as_stored=_leaves_base(recipe),
        )  # fmt: skip
        set_template(tokenizer, recipe.data.chat_template)
        apply_method(
            model, recipe.method, task=recipe.task, seed=recipe.train.seed, base=recipe.base
        )
        narrow_frozen(model)
    return Session(
        recipe=recipe, run=run, base_folder=base_folder, model=model,
        tokenizer=tokenizer, data=data, emit=emit,
    )  # fmt: skip


def _leaves_base(recipe: Recipe) -> bool:
    """Whether a method takes no numbers from the base's weights when it begins."""
    method = recipe.method
    return method.kind == "lora" and method.start == "default" and not method.dora


def build_validate(session: Session) -> Callable[[], Validation]:
    """A function that looks at the validation data with the model as it stands.

    A look that does not fit into memory is told and left out; the training goes on.
    """
    from lorakeet.evaluate.batches import BatchLimit

    limit = BatchLimit(session.emit)

    def validate() -> Validation:
        try:
            has_rows = len(session.data.validation) > 0
            values = _measure_values(session, limit) if has_rows else {}
            return Validation(values=values, answers=answer_prompts(session))
        except MachineError as error:
            session.emit("alarm", code="no-validation", step=0, message=str(error))
            return Validation(values={})

    return validate


def _measure_values(session: Session, limit: BatchLimit) -> dict[str, float]:
    """The loss on the validation rows, and what goes with it for the task."""
    from lorakeet.evaluate.classify import measure_classification
    from lorakeet.evaluate.perplexity import measure_perplexity

    model, data, pad_id = session.model, session.data, pad_id_of(session.tokenizer)
    rows = data.validation
    if session.recipe.task == "classify":
        report = limit.measure(
            lambda size: measure_classification(model, rows, pad_id, data.label_names, size), rows
        )
        return {"loss": report.loss, "accuracy": report.accuracy, "f1": report.macro_f1}
    values = limit.measure(lambda size: measure_perplexity(model, rows, pad_id, size), rows)
    kept = {name: values[name] for name in ("loss", "perplexity")}
    if not math.isfinite(kept["perplexity"]):
        kept["perplexity"] = math.inf
    return kept


def answer_prompts(session: Session) -> tuple[tuple[str, str], ...]:
    """Greedy answers to the recipe's sample prompts, to read with your own eyes."""
    prompts = session.recipe.train.sample_prompts
    if not prompts or session.recipe.task == "classify":
        return ()
    from lorakeet.base.records import Turn
    from lorakeet.infer.generate import encode_prompt
    from lorakeet.infer.sampling import SamplingSettings

    ids = [encode_prompt(session.tokenizer, [Turn(role="user", content=p)]) for p in prompts]
    settings = SamplingSettings(max_new_tokens=session.recipe.evaluate.max_new_tokens)
    answers = _generate_within_memory(session, ids, settings)
    return tuple((p, answer.text) for p, answer in zip(prompts, answers, strict=True))


def _generate_within_memory(session: Session, ids: list[Any], settings: Any) -> list[Any]:
    """Answers to all prompts at once, or to fewer at a time where memory runs out."""
    from lorakeet.infer.generate import generate
    from lorakeet.models.out_of_memory import halve_until_fits

    def answer(size: int) -> list[Any]:
        groups = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [a for group in groups
                for a in generate(session.model, session.tokenizer, group, settings)]  # fmt: skip

    def halve(size: int) -> int:
        if size == 1:
            raise MachineError(
                "sample_prompts: memory ran out while one prompt was answered. Shorten "
                "train.sample_prompts, lower evaluate.max_new_tokens, or free memory."
            )
        return size // 2

    return halve_until_fits(answer, len(ids), halve)[0]


def pad_id_of(tokenizer: Any) -> int:
    """The id that fills short rows; any id will do, as attention masks it out."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
