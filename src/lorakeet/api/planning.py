"""Plan and check: what would happen, told without a model and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakeet.api.resolve import RecipeLike, to_recipe
from lorakeet.base.errors import MachineError
from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.base.run_folder import RunFolder, write_json
from lorakeet.base.units import to_readable_bytes


def plan(recipe: RecipeLike, *, overrides: Sequence[str] = ()) -> Any:
    """Memory, speed and what fits, for each method at this recipe and machine.

    Returns:
        a ``plan.choose.Plan``; ``to_dict()`` gives plain JSON.

    Raises:
        RecipeError, FileFormatError: the recipe or the base's config.json is wrong.
    """
    from lorakeet.models.load import resolve_base
    from lorakeet.plan.choose import make_plan

    asked = to_recipe(recipe, overrides=overrides)
    return make_plan(asked, resolve_base(asked.base))


def make_run_plan(recipe: Recipe, base_folder: Path, run: RunFolder, emit: Emit, data: Any) -> None:
    """Writes ``plan.json`` and refuses what cannot fit.

    Args:
        data: ``data.prepare.PreparedData``, from which time and classes are told.

    Raises:
        MachineError: the predicted memory is more than there is.
    """
    from lorakeet.plan.choose import DataFacts, make_plan

    saved = estimate_saved_fraction(recipe, data.train)
    known = DataFacts(
        num_run_tokens=round((1 - saved) * count_run_tokens(recipe, data.train.lengths)),
        num_labels=len(data.label_names) or None,
    )
    content = make_plan(recipe, base_folder, data=known).to_dict()
    content["shared_prefixes"] = {"saved_fraction": saved, "speed_up": 1 / (1 - saved)}
    write_json(run.plan, content)
    emit("plan", chosen=content["chosen"], saved_fraction=saved)
    asked = next(m for m in content["methods"] if m["kind"] == recipe.method.kind)
    if not asked["fits"]:
        raise MachineError(
            f"{recipe.method.kind} on {recipe.base} needs about "
            f"{to_readable_bytes(asked['bytes']['total'])}: {asked['why']} "
            + (" ".join(content["remedies"]) or "Choose a smaller base.")
        )


def estimate_saved_fraction(recipe: Recipe, rows: Any) -> float:
    """The share of tokens that samples of a pack open with together, so that it is saved.

    A model that cannot share, such as one with dropout of its own, is found out when it
    is loaded; the event ``path`` tells.

    Args:
        rows: ``data.shards.ShardReader`` of the training rows.
    """
    from lorakeet.data.order import StepOrder
    from lorakeet.data.prefixes import measure_saved_fraction
    from lorakeet.plan.memory import AUTO_MICRO_BATCH_TOKENS

    train = recipe.train
    if recipe.task == "classify" or not (train.packing and train.share_prefixes):
        return 0.0
    if getattr(recipe.method, "dropout", 0):
        return 0.0
    asked = train.micro_batch_tokens
    order = StepOrder.of_recipe(recipe, rows.source_of)
    return measure_saved_fraction(
        rows, order, AUTO_MICRO_BATCH_TOKENS if asked == "auto" else asked
    )


def count_run_tokens(recipe: Recipe, lengths: Sequence[int]) -> int:
    """Tokens that pass the model in a whole run, without padding and validation.

    Args:
        lengths: tokens of each training row.

    >>> from lorakeet.base.recipe_file import recipe_from_dict
    >>> data, few = {"train": ["a.jsonl"]}, {"epochs": 2, "batch_size": 4, "max_steps": 3}
    >>> count_run_tokens(recipe_from_dict({"base": "b", "data": data, "train": few}), [10] * 100)
    120
    """
    train, num_rows = recipe.train, len(lengths)
    seen = train.epochs * num_rows
    if train.max_steps:
        seen = min(seen, train.max_steps * train.batch_size)
    return round(int(sum(lengths)) * seen / max(num_rows, 1))


def check_data(recipe: RecipeLike, folder: str | Path, *, emit: Emit, **options: Any) -> Any:
    """Reads, cleans, encodes and lints the data of a recipe without training.

    Args:
        folder: where shards, ``report.json`` and ``dropped.jsonl`` go.

    Returns:
        ``data.prepare.PreparedData``.
    """
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.load import read_tokenizer

    asked = to_recipe(recipe, **options)
    return prepare_data(asked, read_tokenizer(asked.base), Path(folder), emit)
