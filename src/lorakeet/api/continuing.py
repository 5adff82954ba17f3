"""Training that goes on from an adapter: its settings, what must agree, and who the parent is.

    parent adapter/ ── settings ──> recipe ── train on new data ──> adapter/ + "parents"

The recipe names the parent and says nothing else about its shape; what it says must agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakeet.base.errors import DataError, RecipeError
from lorakeet.base.recipe import Recipe
from lorakeet.base.run_folder import RunFolder, sha256_file

if TYPE_CHECKING:
    from lorakeet.adapters.settings import Lora


def take_settings(recipe: Recipe) -> Recipe:
    """The recipe with the settings of its parent adapter, or as it is when it names none.

    Raises:
        RecipeError: the recipe's method says otherwise than the file; all at once.
        FileFormatError: the folder holds no adapter that can be read.
    """
    method = recipe.method
    if method.adapter is None:
        return recipe
    from lorakeet.adapters.files import read_adapter_config
    from lorakeet.adapters.peft_config import from_peft_config

    folder = parent_folder(method.adapter)
    held = _to_method(from_peft_config(read_adapter_config(folder), folder))
    problems = [
        f"method.{key} is {_to_words(getattr(method, key))}, but {folder} has "
        f"{_to_words(held[key])}. Leave it out; an adapter keeps its shape."
        for key in held
        if key in method.model_fields_set and getattr(method, key) != held[key]
    ]
    if method.start != "default":
        problems.append(f"method.start is {method.start}, but training goes on from {folder}.")
    if method.adalora is not None:
        problems.append(f"method.adalora needs a new adapter; {folder} has its ranks already.")
    if problems:
        raise RecipeError(problems)
    told = {key: value for key, value in held.items() if key not in method.model_fields_set}
    kept = method.model_copy(update={**told, "adapter": str(folder)})
    return recipe.model_copy(update={"method": kept})


def parent_folder(place: str) -> Path:
    """The adapter's folder; a run's folder stands for the adapter in it."""
    folder = Path(place)
    inner = RunFolder(folder).adapter
    return inner if (inner / "adapter_config.json").is_file() else folder


def check_parent(recipe: Recipe, labels: tuple[str, ...]) -> None:
    """Whether a parent adapter belongs to this base and these classes.

    Raises:
        DataError: it was trained on another base, or tells other classes apart.
        RequestError: it bears its base in other bits only.
    """
    if recipe.method.adapter is None:
        return
    from lorakeet.adapters.stored import read_lineage
    from lorakeet.models.base_hash import check_adapter

    folder = parent_folder(recipe.method.adapter)
    lineage = read_lineage(folder)
    check_adapter(folder, base=recipe.base, held=recipe.quantization)
    known = lineage.get("labels") or list(labels)
    if known != list(labels):
        raise DataError(
            f"{folder}: this adapter tells {', '.join(known)} apart, the data "
            f"{', '.join(labels)}. Set data.labels to the adapter's, in its order."
        )


def describe_parent(recipe: Recipe) -> dict[str, Any]:
    """What the lineage says of a parent adapter; empty without one."""
    if recipe.method.adapter is None:
        return {}
    from lorakeet.adapters.peft_config import CONFIG
    from lorakeet.adapters.weights import weight_files

    folder = parent_folder(recipe.method.adapter)
    hashes = {file: sha256_file(folder / file) for file in (CONFIG, *weight_files(folder))}
    return {"parents": [{"folder": str(folder), "sha256": hashes}]}


def _to_method(held: Lora) -> dict[str, Any]:
    """An adapter's settings under the names of the section ``method``."""
    keys = ("rank", "alpha", "dropout", "targets", "exclude", "bias", "rslora", "dora",
            "modules_to_save")  # fmt: skip
    taken = {key: getattr(held, key) for key in keys}
    taken["vera"] = held.vera is not None
    if taken["vera"]:
        del taken["alpha"]
    for key in ("rank_pattern", "alpha_pattern"):
        taken[key] = dict(getattr(held, key))
    numbers = sorted(held.layers)
    is_run = bool(numbers) and numbers == list(range(numbers[0], numbers[-1] + 1))
    return {**taken, "layers": (numbers[0], numbers[-1]) if is_run else None}


def _to_words(value: Any) -> str:
    """A setting in a sentence, cut where it is a long list."""
    names = list(value) if isinstance(value, (tuple, list)) else None
    if names is None or len(names) <= 3:
        return str(names if names is not None else value)
    return f"{names[:3]} and {len(names) - 3} more"
