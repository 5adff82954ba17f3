"""What each setting would save: one change of the recipe at a time, the largest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakeet.base.recipe import Recipe
from lorakeet.base.units import MIB
from lorakeet.plan.memory import KINDS, estimate_memory, to_memory_case
from lorakeet.plan.model_facts import ModelFacts
from lorakeet.plan.trained import count_trained

MIN_SAVED_BYTES = MIB  # less is lost among what is not predicted
MIN_TOKENS = 64  # shorter samples than this are of little use
FEWER_BITS = {"lora-8bit": "quantization.kind: int8", "qlora": "quantization.kind: nf4"}


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One change and what it saves.

    Args:
        setting: as a recipe spells it.
        saved_bytes: of the predicted peak.
    """

    setting: str
    saved_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A recipe, the method that it asks for and its largest micro-batch."""

    recipe: Recipe
    kind: str
    tokens: int


def list_knobs(
    recipe: Recipe,
    facts: ModelFacts,
    kind: str,
    *,
    micro_batch_tokens: int,
    longest_row: int,
    is_gpu: bool,
) -> tuple[Knob, ...]:
    """The changes that save memory, the largest first.

    Args:
        longest_row: tokens of the longest sample, which a micro-batch cannot be below.
        kind: one of ``KINDS``, what the recipe asks for.
    """

    def need(asked: _Asked) -> int:
        counted = count_trained(facts, asked.recipe.method, is_classifier=recipe.task == "classify")
        case = to_memory_case(asked.recipe, counted, micro_batch_tokens=asked.tokens, is_gpu=is_gpu)
        return estimate_memory(facts, asked.kind, case).total

    must_cut_rows = longest_row > micro_batch_tokens // 2
    now = need(_Asked(recipe=recipe, kind=kind, tokens=micro_batch_tokens))
    found = [
        Knob(setting=setting, saved_bytes=now - need(asked))
        for setting, asked in _list_changes(
            recipe, kind, micro_batch_tokens, must_cut_rows=must_cut_rows, is_gpu=is_gpu
        )
    ]
    kept = [knob for knob in found if knob.saved_bytes >= MIN_SAVED_BYTES]
    return tuple(sorted(kept, key=lambda knob: -knob.saved_bytes))


def _list_changes(
    recipe: Recipe, kind: str, tokens: int, *, must_cut_rows: bool, is_gpu: bool
) -> Iterator[tuple[str, _Asked]]:
    """Settings in a recipe's words, and the recipe with each."""
    half, method = tokens // 2, recipe.method
    if half >= MIN_TOKENS:
        also = " and data.max_tokens" if must_cut_rows else ""
        yield (f"train.micro_batch_tokens{also}: {half}",
               _Asked(recipe=recipe, kind=kind, tokens=half))  # fmt: skip
    if kind == "full":
        yield "method.kind: lora", _Asked(recipe=recipe, kind="lora", tokens=tokens)
    for fewer in KINDS[max(1, KINDS.index(kind)) + 1 :] if kind != "full" else ():
        yield FEWER_BITS[fewer], _Asked(recipe=recipe, kind=fewer, tokens=tokens)
    if kind != "full" and method.rank > 1 and not method.adalora:
        lower = _with(recipe, "method", rank=method.rank // 2)
        yield f"method.rank: {method.rank // 2}", _Asked(recipe=lower, kind=kind, tokens=tokens)
    for name in ("adamw-8bit", *(("adamw-8bit-paged",) if is_gpu else ())):
        if recipe.train.optimizer != name:
            other = _with(recipe, "train", optimizer=name)
            yield f"train.optimizer: {name}", _Asked(recipe=other, kind=kind, tokens=tokens)
    if recipe.data.validation != 0:
        other = _with(recipe, "data", validation=0.0)
        yield "data.validation: 0", _Asked(recipe=other, kind=kind, tokens=tokens)


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """The recipe with other values in one section."""
    changed = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: changed})
