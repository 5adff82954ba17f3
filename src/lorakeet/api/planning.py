"""Plan and check: what would happen, told without a model and without torch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakeet.api.data_facts import (
    count_run_tokens,
    describe_data,
    estimate_saved_fraction,
    settle_micro_batch,
)
from lorakeet.api.measuring import FAR_FRACTION, RATE_S, choose_trial, measure_recipe
from lorakeet.api.resolve import RecipeLike, to_recipe
from lorakeet.api.widths import settle_widths
from lorakeet.base.errors import MachineError
from lorakeet.base.events import Emit, ignore_events
from lorakeet.base.recipe import Recipe
from lorakeet.base.run_folder import RunFolder, write_json
from lorakeet.base.units import to_readable_bytes

if TYPE_CHECKING:
    from lorakeet.plan.choose import Plan


def plan(
    recipe: RecipeLike,
    *,
    overrides: Sequence[str] = (),
    measure: bool = False,
    price_per_hour: float | None = None,
) -> Any:
    """Memory, speed and what fits, for each method at this recipe and machine.

    Args:
        measure: makes real steps on the longest rows in a process of their own, beside the
            prediction; the data is prepared in a temporary folder.
        price_per_hour: of the machine, in any currency.

    Returns:
        a ``plan.choose.Plan``; ``to_dict()`` gives plain JSON.

    Raises:
        RecipeError, FileFormatError: the recipe or the base's config.json is wrong.
        MachineError: with ``measure``, the steps do not fit.
    """
    from lorakeet.models.load import resolve_base
    from lorakeet.models.remote_code import advise_remote_code
    from lorakeet.models.templates import read_recipe_tokenizer
    from lorakeet.plan.choose import make_plan

    asked = to_recipe(recipe, overrides=overrides)
    base = resolve_base(asked.base)
    if not measure:
        made = make_plan(asked, base, price_per_hour=price_per_hour)
        return replace(made, advice=(*made.advice, *advise_remote_code(base)))
    from lorakeet.data.prepare import prepare_data

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare_data(asked, read_recipe_tokenizer(asked), folder, ignore_events)
        asked = settle_widths(asked, base, data, folder / "widths.json", ignore_events)
        asked = settle_micro_batch(asked, base, data)
        saved = estimate_saved_fraction(asked, data.train)
        known = describe_data(asked, data, saved_fraction=saved)
        made = make_plan(asked, base, data=known, price_per_hour=price_per_hour)
        num_tokens = count_run_tokens(asked, data.train.lengths)
        return _measure(asked, folder, made, num_tokens, price_per_hour=price_per_hour)


def plan_sizes(recipe: RecipeLike, *, overrides: Sequence[str] = ()) -> Any:
    """Models from 0.5B to 70B against common cards and this machine, at a recipe's settings.

    Returns:
        a ``plan.sizes.SizePlan`` for each size; the recipe's base is not read.
    """
    from lorakeet.plan.hardware import read_training_hardware
    from lorakeet.plan.sizes import plan_sizes as make

    return make(to_recipe(recipe, overrides=overrides), read_training_hardware())


def _measure(
    recipe: Recipe, folder: Path, made: Plan, num_tokens: int, *,
    price_per_hour: float | None = None, rate_s: float = RATE_S,
) -> Plan:  # fmt: skip
    """The plan with what real steps took.

    Args:
        num_tokens: of the whole run, shared openings counted each time, as steps count them.
        rate_s: steps are timed until this has passed.

    Raises:
        MachineError: the steps do not fit, or by far not, and then they are not tried.
    """
    from lorakeet.plan.memory import kind_of

    row = next(m for m in made.to_dict()["methods"] if m["kind"] == kind_of(recipe))
    need, free = row["bytes"]["total"], made.hardware.usable_bytes
    if need > FAR_FRACTION * free:
        raise MachineError(
            f"{kind_of(recipe)} on {recipe.base} needs about {to_readable_bytes(need)} and "
            f"{to_readable_bytes(free)} is free, so it is not tried. {' '.join(made.remedies)}"
        )
    measured = measure_recipe(
        recipe, folder, row, num_run_tokens=num_tokens, price_per_hour=price_per_hour,
        rate_s=rate_s,
    )  # fmt: skip
    return replace(made, measured=measured.to_dict())


def make_run_plan(
    recipe: Recipe, base_folder: Path, run: RunFolder, emit: Emit, data: Any,
    *, is_new: bool = False,
) -> None:  # fmt: skip
    """Writes ``plan.json`` and refuses what cannot fit.

    A new run makes trial steps first, unless ``choose_trial`` says why not.

    Args:
        data: ``data.prepare.PreparedData``, from which time and classes are told.
        is_new: whether no step of the run has been made.

    Raises:
        MachineError: the predicted memory, or the measured one where there is one, is more
            than there is.
    """
    from lorakeet.plan.choose import make_plan
    from lorakeet.plan.memory import kind_of

    saved = estimate_saved_fraction(recipe, data.train)
    known = describe_data(recipe, data, saved_fraction=saved)
    made = make_plan(recipe, base_folder, data=known)
    shared = {"shared_prefixes": {"saved_fraction": saved, "speed_up": 1 / (1 - saved)}}
    shared |= {"frozen_cache": describe_frozen_cache(recipe, base_folder, run.path, data)}
    choice = choose_trial(recipe, made, is_new=is_new)
    shared |= {"trial": asdict(choice)}
    write_json(run.plan, made.to_dict() | shared)
    emit("plan", chosen=made.chosen, saved_fraction=saved, trial=asdict(choice))
    if choice.is_made:
        num_tokens = count_run_tokens(recipe, data.train.lengths)
        made = _measure(recipe, run.data, made, num_tokens, rate_s=0.0)
        write_json(run.plan, made.to_dict() | shared)
    content = made.to_dict()
    asked = next(m for m in content["methods"] if m["kind"] == kind_of(recipe))
    fits, told, free = asked["fits"], asked["why"], made.hardware.usable_bytes
    if made.measured:
        peak = made.measured["peak_bytes"] or 0  # where the system does not tell: it was made
        fits = peak <= free
        told = (
            f"took {to_readable_bytes(peak)} in trial steps and {to_readable_bytes(free)} is free."
        )
    if not fits:
        remedy = " ".join(made.remedies) or _tell_knobs(content["knobs"])
        raise MachineError(f"{kind_of(recipe)} on {recipe.base} {told} {remedy}")


def _tell_knobs(knobs: Sequence[Mapping[str, Any]]) -> str:
    """The changes that save most, for where the prediction fits and the trial does not."""
    most = [f"{k['setting']} ({to_readable_bytes(k['saved_bytes'])})" for k in knobs[:3]]
    return f"What saves most: {', '.join(most)}." if most else "Choose a smaller base."


def describe_frozen_cache(
    recipe: Recipe, base_folder: Path, folder: Path, data: Any
) -> dict[str, Any]:
    """Whether the answers of the layers below ``method.layers`` will be kept, and their cost.

    What only the loaded model shows, such as dropout of its own, the event ``frozen_cache``
    of the run tells.

    Args:
        folder: of the run, on whose disk they lie.
    """
    from lorakeet.plan.frozen_cache import FrozenCase, plan_frozen_cache
    from lorakeet.plan.hardware import read_training_hardware
    from lorakeet.plan.model_facts import read_model_facts

    first, rows = (recipe.method.layers or (0, 0))[0], data.train
    facts = read_model_facts(base_folder) if first else None
    is_auto = recipe.train.cache_frozen_layers == "auto"
    width = 2 if read_training_hardware().gpus else 4
    return plan_frozen_cache(recipe, FrozenCase(
        num_frozen=first, num_layers=facts.layers if facts else 1, num_rows=len(rows),
        num_tokens=int(rows.lengths.sum()), token_bytes=width * facts.hidden if facts else 0,
        free_bytes=shutil.disk_usage(folder).free,
        saved_fraction=estimate_saved_fraction(recipe, rows) if first and is_auto else 0.0,
    )).to_dict()  # fmt: skip


def check_data(recipe: RecipeLike, folder: str | Path, *, emit: Emit, **options: Any) -> Any:
    """Reads, cleans, encodes and lints the data of a recipe without training.

    Args:
        folder: where shards, ``report.json`` and ``dropped.jsonl`` go.

    Returns:
        ``data.prepare.PreparedData``.
    """
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.templates import read_recipe_tokenizer

    asked = to_recipe(recipe, **options)
    return prepare_data(asked, read_recipe_tokenizer(asked), Path(folder), emit)
