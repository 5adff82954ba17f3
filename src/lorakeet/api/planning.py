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


def make_run_plan(recipe: Recipe, base_folder: Path, run: RunFolder, emit: Emit) -> None:
    """Writes ``plan.json`` and refuses what cannot fit.

    Raises:
        MachineError: the predicted memory is more than there is.
    """
    from lorakeet.plan.choose import make_plan

    content = make_plan(recipe, base_folder).to_dict()
    write_json(run.plan, content)
    emit("plan", chosen=content["chosen"])
    asked = next(m for m in content["methods"] if m["kind"] == recipe.method.kind)
    if not asked["fits"]:
        raise MachineError(
            f"{recipe.method.kind} on {recipe.base} needs about "
            f"{to_readable_bytes(asked['bytes']['total'])}: {asked['why']} "
            "Choose a smaller base, method.kind lora, or fewer data.max_tokens."
        )


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
