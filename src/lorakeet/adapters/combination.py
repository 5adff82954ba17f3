"""What a combination of adapters is asked for, and every reason why it cannot be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorakeet.adapters.stored import StoredAdapter, some

EXACT_KINDS = ("concatenation", "svd")
FACTOR_KINDS = ("linear", "ties", "dare", "dare-ties")
CHANGE_KINDS = ("ties-svd", "dare-svd", "dare-ties-svd")
KINDS = (*EXACT_KINDS, *FACTOR_KINDS, *CHANGE_KINDS)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How adapters become one.

    Args:
        kind: one of ``KINDS``.
        weights: w_i, one for each adapter; any finite number.
        rank: of the result, for the kinds with svd; None takes the largest of the parents'.
        density: share of the elements that stay, above 0 to 1; ties and dare need it.
        seed: of DARE's drops.
    """

    kind: str
    weights: tuple[float, ...]
    rank: int | None = None
    density: float | None = None
    seed: int = 0


def find_problems(
    adapters: Sequence[StoredAdapter], how: Combination, base: str | None
) -> list[str]:
    """Every reason why these adapters cannot be combined so, one sentence each."""
    problems = _find_wrong_settings(len(adapters), how)
    problems += [
        f"{each.folder}: its change is not s B A alone ({'; '.join(each.beside_factors)}), so it "
        "cannot be added to others. Merge it into the base, or take plain LoRA."
        for each in adapters
        if each.beside_factors
    ]
    problems += [
        f"{each.folder}: its factors hold the repair of its rounded base (LoftQ), which a sum or "
        "a weight would repeat or weaken. Merge it with --into dequantised."
        for each in adapters
        if each.lineage.get("start") == "loftq"
    ]
    known = ("base_weights_sha256", "base_sha256")
    hashes = [next((e.lineage[k] for k in known if k in e.lineage), None) for e in adapters]
    same_bytes = None not in hashes and len(set(hashes)) == 1
    other_bytes = None not in hashes and len(set(hashes)) > 1
    names = {each.base for each in adapters}
    if base is None and len(names) == 1 and other_bytes:
        problems.append(
            f"all adapters name {names.pop()}, but were trained on different versions of it (the "
            "hashes in lorakeet.json differ). If they are one model all the same, state it as base."
        )
    elif base is None and not same_bytes and len(names) > 1:
        named = ", ".join(f"{each.folder} on {each.base}" for each in adapters)
        problems.append(
            f"the adapters name different bases: {named}. Their changes mean nothing to each "
            "other's base; if it is one model under several names, state it as base."
        )
    if how.kind not in EXACT_KINDS:
        problems += _find_different(adapters, needs_ranks=how.kind in FACTOR_KINDS)
    problems += _find_misshapen(adapters)
    shared = {key for each in adapters for key in each.others}
    unlike = [key for key in sorted(shared) if not _is_one_tensor(key, adapters)]
    if unlike:
        problems.append(
            f"{some(unlike)}: trained in full by more than one adapter with different results, "
            "which are no changes that could be added. Only one adapter may bring its own."
        )
    return problems


def _find_wrong_settings(num_adapters: int, how: Combination) -> list[str]:
    """What is wrong with the request itself."""
    problems = []
    if how.kind not in KINDS:
        problems.append(f"kind is '{how.kind}'; known are {', '.join(KINDS)}.")
    if not num_adapters or len(how.weights) != num_adapters:
        problems.append(
            f"{len(how.weights)} weights for {num_adapters} adapters; needed is one for each."
        )
    if wrong := [w for w in how.weights if not math.isfinite(w)]:
        problems.append(f"weights {wrong} are not finite numbers.")
    if how.rank is not None and (how.rank < 1 or not how.kind.endswith("svd")):
        problems.append(
            f"rank is {how.rank} for {how.kind}; it is 1 or more and given for svd kinds only, as "
            "the others keep or add the parents' ranks."
        )
    is_thinned = how.kind.startswith(("ties", "dare"))
    if is_thinned and (how.density is None or not 0 < how.density <= 1):
        problems.append(
            f"density is {how.density}; {how.kind} needs a share above 0 and at most 1, such as "
            "0.2 (TIES) or 0.5 (DARE)."
        )
    if not is_thinned and how.density is not None:
        problems.append(f"density is {how.density}, which {how.kind} does not use. Leave it out.")
    return problems


def _find_different(adapters: Sequence[StoredAdapter], *, needs_ranks: bool) -> list[str]:
    """Layers that not all adapters have, or have with another rank."""
    modules = sorted({module for each in adapters for module in each.layers})
    absent = [m for m in modules if any(m not in each.layers for each in adapters)]
    uneven = [
        f"{m} ({', '.join(str(each.layers[m].rank) for each in adapters)})"
        for m in modules
        if m not in absent and len({each.layers[m].rank for each in adapters}) > 1
    ]
    problems = []
    if absent:
        problems.append(
            f"targets differ: not every adapter has {some(absent)}. Kinds concatenation and svd "
            "take a missing layer as no change."
        )
    if uneven and needs_ranks:
        problems.append(
            f"ranks differ: {some(uneven)}. Kind concatenation, or one with svd, takes any ranks."
        )
    return problems


def _find_misshapen(adapters: Sequence[StoredAdapter]) -> list[str]:
    """Layers of one name whose matrices have different sizes: another base after all."""
    shapes: dict[str, set[tuple]] = {}
    for adapter in adapters:
        for module, layer in adapter.layers.items():
            key = (tuple(layer.A.shape[1:]), layer.B.shape[0], layer.is_embedding)
            shapes.setdefault(module, set()).add(key)
    odd = [module for module, found in shapes.items() if len(found) > 1]
    if not odd:
        return []
    return [f"{some(odd)}: the sizes differ between the adapters, so their bases are not one."]


def _is_one_tensor(key: str, adapters: Sequence[StoredAdapter]) -> bool:
    """Whether all adapters that hold a tensor hold the same numbers."""
    held = [each.others[key] for each in adapters if key in each.others]
    return all(torch.equal(tensor, held[0]) for tensor in held)
