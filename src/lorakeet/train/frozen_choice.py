"""Whether a run keeps the answers of its frozen layers: the plan's rules on the model itself."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.data.shards import ShardReader
from lorakeet.models.frozen import FrozenPart, find_frozen_part
from lorakeet.models.head import read_head_facts
from lorakeet.plan.frozen_cache import FrozenCachePlan, FrozenCase, plan_frozen_cache
from lorakeet.train.frozen_states import FrozenStates
from lorakeet.train.step import StepRunner


def keep_frozen(
    runner: StepRunner, recipe: Recipe, rows: ShardReader, folder: Path,
    *, saved_fraction: float, emit: Emit,
) -> StepRunner:  # fmt: skip
    """The runner that takes what frozen layers answered from a folder, or the same runner.

    Emits ``frozen_cache`` with the decision, and an alarm where it was asked for and is off.

    Args:
        saved_fraction: of the tokens, by sharing openings, which ends where states are kept.
    """
    if recipe.train.cache_frozen_layers == "off" or recipe.method.kind == "full":
        return runner
    part = _find_part(runner, recipe.task)
    if isinstance(part, str):
        _tell(FrozenCachePlan(is_on=False, num_layers=0, num_bytes=0, speed_up=1.0,
                              reason=f"Off: {part}"), recipe, emit)  # fmt: skip
        return runner
    folder.parent.mkdir(parents=True, exist_ok=True)
    plan = plan_frozen_cache(recipe, FrozenCase(
        num_frozen=len(part.layers), num_layers=part.num_layers, num_rows=len(rows),
        num_tokens=int(rows.lengths.sum()), token_bytes=part.width * part.dtype.itemsize,
        free_bytes=_free_bytes(folder), saved_fraction=saved_fraction,
    ))  # fmt: skip
    _tell(plan, recipe, emit)
    if not plan.is_on:
        return runner
    states = FrozenStates(folder, runner.model, part, limit_bytes=plan.num_bytes, emit=emit)
    return replace(runner, frozen=states, shares=False)


def _find_part(runner: StepRunner, task: str) -> FrozenPart | str:
    """The frozen layers, or why their answers cannot be kept in this run."""
    if not runner.packs:
        return "rows are padded, not packed."
    # Asked here, as the model cannot be asked while its layers are replaced.
    if task != "classify" and not read_head_facts(runner.model).is_plain:
        return "the model's logits need its own whole forward pass."
    return find_frozen_part(runner.model)


def _tell(plan: FrozenCachePlan, recipe: Recipe, emit: Emit) -> None:
    """The event, and the alarm when the recipe asked for what cannot be."""
    emit("frozen_cache", **asdict(plan))
    if recipe.train.cache_frozen_layers == "on" and not plan.is_on:
        emit("alarm", code="no-frozen-cache", step=0,
             message=f"train.cache_frozen_layers: on. {plan.reason}")  # fmt: skip


def _free_bytes(folder: Path) -> int:
    """Of the disk, with what an earlier process of this run has kept already."""
    kept = folder / "states.bin"
    own = kept.stat().st_size if kept.is_file() else 0
    return shutil.disk_usage(folder.parent).free + own
