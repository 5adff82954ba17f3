"""``lorakeet plan --learning-rate``: which rate, and which rank, the data ask for."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakeet.api.resolve import RecipeLike, to_recipe
from lorakeet.base.events import ignore_events

if TYPE_CHECKING:
    from lorakeet.train.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class RateAdvice:
    """A rate to train with, and what it rests on.

    Args:
        recommended: the rate with the lowest loss.
        asked: the recipe's.
        results: rate and loss of each trial, by rising rate; a loss is None where it was no
            number.
        advice: sentences about the rate and the rank.
        picture: a PNG file, where matplotlib is installed and a path was given.
    """

    recommended: float
    asked: float
    first_loss: float
    results: tuple[dict[str, float | None], ...]
    num_steps: int
    num_held_out: int
    advice: tuple[str, ...]
    picture: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "results": list(self.results), "advice": list(self.advice)}


def try_rates(
    recipe: RecipeLike, *, overrides: Sequence[str] = (), picture: Path | None = None
) -> RateAdvice:
    """Short runs at three to five rates on a model of their own; nothing of them is kept.

    The same recipe gives the same figures: rows, dropout and start follow from its seed.

    Args:
        picture: where the plot goes, if matplotlib is installed.

    Raises:
        RecipeError, DataError, MachineError: as ``train``.
    """
    from lorakeet.api.session import open_session, pad_id_of
    from lorakeet.base.run_folder import RunFolder
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.load import resolve_base
    from lorakeet.models.templates import read_recipe_tokenizer
    from lorakeet.train.sweep import sweep_rates

    asked = to_recipe(recipe, overrides=overrides)
    base = resolve_base(asked.base)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare_data(asked, read_recipe_tokenizer(asked), folder, ignore_events)
        session = open_session(asked, RunFolder(folder), base, data, ignore_events)
        pad_id = pad_id_of(session.tokenizer)
        found = sweep_rates(session.model, asked, data, pad_id=pad_id, emit=ignore_events)
        advice = [_tell_rate(found, asked.train.learning_rate)]
        if asked.method.kind == "lora":
            advice.append(_tell_rank(asked, base, data))
    return RateAdvice(
        recommended=found.best, asked=asked.train.learning_rate, first_loss=found.first_loss,
        results=tuple(asdict(result) for result in found.results), num_steps=found.num_steps,
        num_held_out=found.num_held_out, advice=tuple(advice), picture=_draw(found, picture),
    )  # fmt: skip


def _tell_rate(found: Sweep, asked: float) -> str:
    """What the losses say of the recipe's rate."""
    if all(result.loss is None for result in found.results):
        return "learning_rate: the loss was no number at any rate. Look at the data and the base."
    if not found.is_bracketed:
        side = "above" if found.best == max(r.rate for r in found.results) else "below"
        return (
            f"learning_rate: {found.best:.2g} was the best tried, at the end of the sweep; a rate "
            f"{side} it may be better still."
        )
    is_same = abs(found.best / asked - 1) < 1e-6
    verdict = (
        "the recipe's rate stands" if is_same else f"set train.learning_rate: {found.best:.2g}"
    )
    return (
        f"learning_rate: {verdict}. After {found.num_steps} steps it was the best of "
        f"{len(found.results)} on {found.num_held_out} rows that were not trained; a run of many "
        "more steps wants the same or a little less (LoRA Without Regret, 2025)."
    )


def _tell_rank(recipe: Any, base: Path, data: Any) -> str:
    """The rank that the number of trained tokens asks for."""
    from lorakeet.plan.advice import advise_rank
    from lorakeet.plan.model_facts import read_model_facts
    from lorakeet.plan.trained import count_trained

    is_classifier = recipe.task == "classify"
    labels = len(data.label_names) if is_classifier else None
    facts = read_model_facts(base, num_labels=labels)
    counted = count_trained(facts, recipe.method, is_classifier=is_classifier)
    tokens = len(data.train) if is_classifier else data.report["tokens"]["trained"]
    return advise_rank(recipe, counted, tokens)


def _draw(found: Sweep, path: Path | None) -> str | None:
    """The plot, where it is asked for and can be made."""
    from lorakeet.evaluate.plots import has_matplotlib, write_rates_picture

    points = [(r.rate, r.loss) for r in found.results if r.loss is not None]
    if path is None or not points or not has_matplotlib():
        return None
    return str(write_rates_picture(path, points, found.best, found.first_loss))
