"""What the prepared data tell a plan: tokens, lengths, and what samples share.

A shared opening is computed once a pack, so larger packs hold fewer copies of it, and a pack
that is smaller than two samples shares nothing.  Larger packs need more memory, so they are
taken only where they save work and fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakeet.base.recipe import Recipe

if TYPE_CHECKING:
    from lorakeet.data.prepare import PreparedData
    from lorakeet.data.shards import ShardReader
    from lorakeet.plan.choose import DataFacts

WORTH_FRACTION = 0.9  # of the tokens that are left; a larger pack must come below it
TIMES_LARGER = (2, 4, 8)  # than the usual pack


def describe_data(recipe: Recipe, data: PreparedData, *, saved_fraction: float = 0.0) -> DataFacts:
    """What a plan needs of the data.

    Args:
        saved_fraction: of the tokens, which need not pass the model as samples share them.
    """
    from lorakeet.plan.choose import DataFacts
    from lorakeet.plan.memory import count_micro_batch_tokens

    lengths = data.train.lengths
    longest = sorted((int(n) for n in lengths), reverse=True)[: recipe.train.batch_size]
    most = sum(longest) if recipe.train.packing else longest[0] * len(longest)
    limit = count_micro_batch_tokens(recipe, longest=longest[0])
    return DataFacts(
        num_run_tokens=round((1 - saved_fraction) * count_run_tokens(recipe, lengths)),
        num_labels=len(data.label_names) or None,
        max_micro_batch_tokens=max(1, min(limit, most)),
        longest_row=longest[0],
        row_tokens=sum(int(n) ** 2 for n in lengths) / max(1, sum(int(n) for n in lengths)),
    )


def estimate_saved_fraction(recipe: Recipe, rows: ShardReader) -> float:
    """The share of tokens that samples of a pack open with together, so that it is saved.

    A model that cannot share, such as one with dropout of its own, is found out when it
    is loaded; the event ``path`` tells.

    Args:
        rows: of training.
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


def settle_micro_batch(recipe: Recipe, base_folder: Path, data: PreparedData) -> Recipe:
    """The recipe with larger packs, where ``auto`` may choose and they save a tenth of the work.

    Each larger limit is compared with the one chosen so far, so that a document of 3,000 tokens
    under many questions finds the pack of 4,096 although 2,048 saves nothing.
    """
    from lorakeet.plan.memory import AUTO_MICRO_BATCH_TOKENS

    if recipe.train.micro_batch_tokens != "auto":
        return recipe
    chosen, left = recipe, 1 - estimate_saved_fraction(recipe, data.train)
    for times in TIMES_LARGER:
        larger = _with_limit(recipe, times * AUTO_MICRO_BATCH_TOKENS)
        left_then = 1 - estimate_saved_fraction(larger, data.train)
        if left_then <= WORTH_FRACTION * left and _fits(larger, base_folder, data):
            chosen, left = larger, left_then
    return chosen


def _with_limit(recipe: Recipe, micro_batch_tokens: int) -> Recipe:
    train = recipe.train.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
    return recipe.model_copy(update={"train": train})


def _fits(recipe: Recipe, base_folder: Path, data: PreparedData) -> bool:
    """Whether the method that is asked for is predicted to fit."""
    from lorakeet.plan.choose import make_plan
    from lorakeet.plan.memory import kind_of

    made = make_plan(recipe, base_folder, data=describe_data(recipe, data))
    return made.chosen == kind_of(recipe)


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
