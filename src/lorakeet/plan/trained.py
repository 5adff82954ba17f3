"""What a LoRA recipe trains: r (in + out) for every adapted module, and modules in full.

Names are matched as ``adapters.targets`` matches them on the built model, over the
names that ``plan.model_facts`` lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lorakeet.base.method_settings import MethodSettings
from lorakeet.plan.families import CLASS_HEADS
from lorakeet.plan.model_facts import ModelFacts
from lorakeet.plan.parts import ADAPTABLE, Part, stacks_of

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class TrainedCount:
    """What an adapter trains.

    Args:
        adapter_parameters: entries of A and B, and trained biases.
        saved_parameters: entries of modules trained in full.
        num_targets: adapted modules; 0 where the targets match nothing.
        rank_sum: r of all adapted modules together.
        output_sum: output widths of all adapted modules together.
        stacked_parameters: weights of all adapted stacks of experts together.
        largest_stack: weights of the largest one.
        missing_saved: names of ``modules_to_save`` that match nothing.
    """

    adapter_parameters: int
    saved_parameters: int
    num_targets: int
    missing_saved: tuple[str, ...] = ()
    rank_sum: int = 0
    output_sum: int = 0
    stacked_parameters: int = 0
    largest_stack: int = 0

    @property
    def total(self) -> int:
        """Everything that gets a gradient."""
        return self.adapter_parameters + self.saved_parameters

    @property
    def is_misnamed(self) -> bool:
        """Whether attaching would be refused, as names match nothing."""
        return not self.num_targets or bool(self.missing_saved)


def count_trained(
    facts: ModelFacts, method: MethodSettings, *, is_classifier: bool
) -> TrainedCount:
    """The parameters that LoRA trains in a model.

    Args:
        is_classifier: a new classification head is trained in full.
    """
    heads = CLASS_HEADS if is_classifier else ()
    keys = {*method.modules_to_save, *(h for h in heads if _find_saved(facts, {h}))}
    saved = set(_find_saved(facts, keys))
    adapted = [(p, n) for p, n in _adaptable(facts) if n not in saved and _is_target(p, n, method)]
    stacks = [part.weights for part, _ in adapted if part.kind == "stack"]
    ranks = [(_rank_of(method, name), part) for part, name in adapted]
    weights = {name: part.weights for part in facts.parts for name in part.names()}
    return TrainedCount(
        adapter_parameters=sum(_count_factors(method, r, part) for r, part in ranks)
        + _count_biases(facts, method, {name for _, name in adapted}, saved),
        saved_parameters=sum(weights[name] for name in saved),
        num_targets=len(adapted),
        missing_saved=tuple(k for k in method.modules_to_save if not _find_saved(facts, {k})),
        rank_sum=sum(r for r, part in ranks if part.kind != "stack"),
        output_sum=sum(part.num_out for _, part in ranks if part.kind != "stack"),
        stacked_parameters=sum(stacks), largest_stack=max(stacks, default=0),
    )  # fmt: skip


def _count_factors(method: MethodSettings, r: int, part: Part) -> int:
    """Entries of A and B, or of VeRA's two vectors."""
    return r + part.num_out if method.vera else r * (part.num_in + part.num_out)


def _count_biases(
    facts: ModelFacts, method: MethodSettings, adapted: set[str], saved: set[str]
) -> int:
    """Trained biases: those of the adapted modules, or all outside of modules trained in full."""
    if method.bias == "none":
        return 0
    return sum(
        part.num_biases
        for part in facts.parts
        for name in part.names()
        if (name in adapted if method.bias == "lora_only" else name not in saved)
    )


def _adaptable(facts: ModelFacts) -> Iterator[tuple[Part, str]]:
    for part in facts.parts:
        if part.kind in ADAPTABLE:
            yield from ((part, name) for name in part.names())
        for stack in stacks_of(part) if part.kind == "experts" else ():
            yield from ((stack, name) for name in stack.names())


def _is_target(part: Part, name: str, method: MethodSettings) -> bool:
    if _is_excluded(name, method) or not _is_in_layers(name, method):
        return False
    targets = method.targets
    if targets == ALL_LINEAR:
        return part.kind == "linear"
    if isinstance(targets, str):
        return _is_match(targets, name) or _ends_with(name, targets)
    return any(_ends_with(name, key) for key in targets)


def _is_excluded(name: str, method: MethodSettings) -> bool:
    if isinstance(method.exclude, str):
        return _is_match(method.exclude, name)
    return any(_ends_with(name, key) for key in method.exclude)


def _is_in_layers(name: str, method: MethodSettings) -> bool:
    """Whether the first number in a name lies in the recipe's layers."""
    if method.layers is None:
        return True
    found = re.match(r"(?:.*?\.)??[^.]*\.(\d+)\.", name)
    return bool(found) and method.layers[0] <= int(found[1]) <= method.layers[1]


def _find_saved(facts: ModelFacts, keys: set[str]) -> list[str]:
    """The modules that are one of ``modules_to_save`` or lie in one."""
    return [
        name
        for part in facts.parts
        for name in part.names()
        if any(_lies_in(name, key) for key in keys)
    ]


def _rank_of(method: MethodSettings, name: str) -> int:
    """r of a module: the first matching key of ``rank_pattern``, which is a regular expression."""
    found = (r for key, r in method.rank_pattern.items() if _is_match(rf"(.*\.)?({key})", name))
    return next(found, method.rank)


def _is_match(pattern: str, name: str) -> bool:
    """Whether a regular expression is one and matches the whole name."""
    try:
        return bool(re.fullmatch(pattern, name))
    except re.error:
        return False


def _ends_with(name: str, key: str) -> bool:
    return name == key or name.endswith(f".{key}")


def _lies_in(name: str, key: str) -> bool:
    """Whether a module or one around it has a name that ends with a key at a dot."""
    return f".{key}." in f".{name}."
