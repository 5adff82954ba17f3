"""A loaded run: model, tokenizer and data, and what is looked at while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import Validation
from lorakeet.base.run_folder import RunFolder


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
    from lorakeet.models.load import load_model
    from lorakeet.models.methods import apply_method

    model, tokenizer = load_model(recipe.base, task=recipe.task, label_names=data.label_names)
    apply_method(model, recipe.method, task=recipe.task, seed=recipe.train.seed)
    return Session(
        recipe=recipe, run=run, base_folder=base_folder, model=model,
        tokenizer=tokenizer, data=data, emit=emit,
    )  # fmt: skip


def build_validate(session: Session) -> Callable[[], Validation]:
    """A function that looks at the validation data with the model as it stands."""
    pad_id = pad_id_of(session.tokenizer)

    def validate() -> Validation:
        from lorakeet.evaluate.classify import measure_classification
        from lorakeet.evaluate.perplexity import measure_perplexity

        data = session.data
        if len(data.validation) == 0:
            return Validation(values={}, answers=answer_prompts(session))
        if session.recipe.task == "classify":
            report = measure_classification(
                session.model, data.validation, pad_id, data.label_names
            )
            values = {"loss": report.loss, "accuracy": report.accuracy, "f1": report.macro_f1}
            return Validation(values=values)
        values = measure_perplexity(session.model, data.validation, pad_id)
        kept = {name: values[name] for name in ("loss", "perplexity")}
        if not math.isfinite(kept["perplexity"]):
            kept["perplexity"] = math.inf
        return Validation(values=kept, answers=answer_prompts(session))

    return validate


def answer_prompts(session: Session) -> tuple[tuple[str, str], ...]:
    """Greedy answers to the recipe's sample prompts, to read with your own eyes."""
    prompts = session.recipe.train.sample_prompts
    if not prompts or session.recipe.task == "classify":
        return ()
    from lorakeet.base.records import Turn
    from lorakeet.infer.generate import encode_prompt, generate
    from lorakeet.infer.sampling import SamplingSettings

    ids = [encode_prompt(session.tokenizer, [Turn(role="user", content=p)]) for p in prompts]
    settings = SamplingSettings(max_new_tokens=session.recipe.evaluate.max_new_tokens)
    answers = generate(session.model, session.tokenizer, ids, settings)
    return tuple((p, answer.text) for p, answer in zip(prompts, answers, strict=True))


def pad_id_of(tokenizer: Any) -> int:
    """The id that fills short rows; any id will do, as attention masks it out."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
