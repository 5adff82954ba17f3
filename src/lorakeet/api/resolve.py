"""What a run was decided to be: the recipe, versions and content hashes.

``resolved.yaml`` lets a stranger tell whether two runs can be compared: the same
values, the same bytes of base and data, the same library versions.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lorakeet
from lorakeet.api.continuing import describe_parent, take_settings
from lorakeet.base.errors import FileFormatError, RequestError
from lorakeet.base.recipe import Recipe
from lorakeet.base.recipe_file import (
    read_recipe,
    read_yaml,
    recipe_from_dict,
    recipe_to_dict,
    to_yaml,
)
from lorakeet.base.run_folder import RunFolder, sha256_folder, write_text

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")

RecipeLike = str | Path | Mapping[str, Any] | Recipe


def to_recipe(recipe: RecipeLike, *, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe behind a path, a mapping or a recipe, with its parent adapter's settings.

    Raises:
        RecipeError: every mistake at once.
        FileFormatError: the parent adapter cannot be read.
        RequestError: overrides are given for what is not a file.
    """
    if isinstance(recipe, (str, Path)):
        return take_settings(read_recipe(recipe, overrides=overrides))
    if overrides:
        raise RequestError("overrides need a recipe file; change the mapping instead.")
    return take_settings(recipe if isinstance(recipe, Recipe) else recipe_from_dict(recipe))


def read_installed_versions() -> dict[str, str]:
    """The versions that can change a number: Python, Lorakeet and the packages below it."""
    found = {"python": platform.python_version(), "lorakeet": lorakeet.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def read_machine() -> dict[str, Any]:
    """What of the machine can change how sums round: system, processor, device, threads."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "system": platform.system(), "processor": platform.machine(),
        "device": device, "threads": torch.get_num_threads(),
    }  # fmt: skip


def write_resolved(
    run: RunFolder, recipe: Recipe, *, base_folder: Path, data: dict, decided: Mapping[str, Any]
) -> None:
    """Records every decided value, the versions and the hashes of base and data.

    Args:
        decided: what follows from recipe, data and machine together.
    """
    content = {
        "recipe": recipe_to_dict(recipe),
        "decided": dict(decided),
        "versions": read_installed_versions(),
        "machine": read_machine(),
        "hashes": {"base": sha256_folder(base_folder), "data": data, **describe_parent(recipe)},
    }
    write_text(run.resolved, to_yaml(content))


def read_resolved(run: RunFolder) -> dict[str, Any]:
    """The content of ``resolved.yaml``.

    Raises:
        FileFormatError: the folder holds no run.
    """
    if not run.resolved.is_file():
        raise FileFormatError(
            f"{run.path}: this is no run folder, as it holds no resolved.yaml. "
            "Name the folder that was given to 'lorakeet train --run'."
        )
    return read_yaml(run.resolved)


def recipe_of_run(run: RunFolder) -> Recipe:
    """The recipe that a run was started with."""
    return recipe_from_dict(read_resolved(run)["recipe"])


def recipe_to_resume(run: RunFolder) -> Recipe:
    """The recipe that a run goes on with; one killed before it was resolved has the asked one.

    Raises:
        FileFormatError: the folder holds no run.
    """
    if not run.resolved.is_file() and run.events.is_file() and run.recipe.is_file():
        return recipe_from_dict(read_yaml(run.recipe))
    return recipe_of_run(run)


def describe_other_data(run: RunFolder, found: Mapping[str, Any]) -> str:
    """A warning when the sources are not those a run was started with; empty when they are."""
    past = (read_resolved(run)["hashes"].get("data") or {}).get("files") or {}
    present = found.get("files") or {}
    names = past.keys() | present.keys()
    other = sorted(name for name in names if past.get(name) != present.get(name))
    if not other:
        return ""
    return (
        f"{', '.join(other)}: not the bytes that this run was started with, so it will not end as "
        "an undisturbed one. Put the old files back, or start a new run."
    )
