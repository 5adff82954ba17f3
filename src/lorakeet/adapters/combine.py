"""One adapter made of several, on the disk and without their base.

    wanted  D = sum_i w_i s_i B_i A_i           negative weights subtract (arXiv:2212.04089)

    concatenation   B = [B_1 B_2 ..], A = [w_1 s_1 A_1; ..]: exactly D, rank = sum of ranks
    svd             the nearest matrix to D of the asked rank, from the factors by QR
    linear          A = sum_i sqrt|w_i s_i| A_i with w_i's sign, B = sum_i sqrt|w_i s_i| B_i:
                    keeps the rank, but B A also holds cross terms B_i A_j that are not in D
    ties, dare, dare-ties        element-wise methods on the factors A and B, as in PEFT
    ties-svd, dare-svd, ..       the same on the full changes s B A, then the nearest rank

Whatever the kind, the report says for each layer how far the result lies from D.
Methods on factors depend on the basis that each training happened to choose for its
r inner directions, which no other adapter shares; the ``-svd`` kinds see the changes
only, and cost one full matrix and its SVD a layer.

Where PEFT 0.21 differs: it keeps ``use_rslora`` of the first adapter with
alpha = rank, so that combined rsLoRA adapters come out sqrt(rank) too strong; here
the result has the scale 1 always.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakeet.adapters.combination import CHANGE_KINDS, FACTOR_KINDS, Combination, find_problems
from lorakeet.adapters.low_rank import (
    LowRank,
    add_changes,
    compress_change,
    compress_matrix,
    distance,
    norm_of,
)
from lorakeet.adapters.stored import (
    StoredAdapter,
    StoredLayer,
    read_stored,
    to_file_layers,
    write_stored,
)
from lorakeet.adapters.task_vectors import Thinning, merge_vectors
from lorakeet.base.errors import FileFormatError, RequestError


@dataclass(frozen=True, kw_only=True)
class CombinedLayer:
    """What became of one layer.

    Args:
        norm: of the wanted sum D, Frobenius.
        error: ||result - D|| / ||D||; 0 where D is zero and so is the result.
    """

    rank: int
    norm: float
    error: float


def combine(
    folders: Sequence[str | Path], out: str | Path, how: Combination, *, base: str | None = None
) -> dict[str, CombinedLayer]:
    """Writes the combination as a new adapter folder, with its parents in ``lorakeet.json``.

    Args:
        base: states that all belong to this base, whatever their files call it.

    Returns:
        module -> what became of it.

    Raises:
        RequestError: bases, ranks, targets, sizes or settings that do not go together; all
            are listed.
        FileFormatError: adapters that cannot be read; all are listed.
    """
    adapters, broken = [], []
    for folder in folders:
        try:
            adapters.append(read_stored(folder))
        except FileFormatError as error:
            broken.append(str(error))
    if broken:
        raise FileFormatError("\n".join(broken))
    if problems := find_problems(adapters, how, base):
        raise RequestError("\n".join(problems))
    parents = {
        module: [each.layers.get(module) for each in adapters]
        for module in sorted({module for each in adapters for module in each.layers})
    }
    layers = {module: _combine_layer(module, own, how) for module, own in parents.items()}
    others = {key: tensor for each in adapters for key, tensor in each.others.items()}
    write_stored(
        out, to_file_layers(layers) | others, _to_config(adapters, layers, base),
        _to_lineage(adapters, how),
    )  # fmt: skip
    return {m: _measure(layers[m], own, how.weights) for m, own in parents.items()}


def _combine_layer(
    module: str, parents: Sequence[StoredLayer | None], how: Combination
) -> StoredLayer:
    """One layer's new factors, float32 and with the scale 1."""
    own = [layer for layer in parents if layer is not None]
    weights = [w for w, layer in zip(how.weights, parents, strict=True) if layer is not None]
    if how.kind in FACTOR_KINDS:
        new = _merge_factors(module, own, weights, how)
    else:
        new = _merge_changes(module, own, weights, how)
    A = new.A.float().reshape(-1, *own[0].A.shape[1:])
    B = new.B.float().reshape(own[0].B.shape[0], -1, *own[0].B.shape[2:])
    return StoredLayer(A=A, B=B, scale=1.0, is_embedding=own[0].is_embedding)


def _merge_factors(
    module: str, own: Sequence[StoredLayer], weights: Sequence[float], how: Combination
) -> LowRank:
    """A from all A and B from all B, each with the root of |w s|; the sign goes to A."""
    thinning = Thinning(method=how.kind, density=how.density or 1.0, seed=how.seed)
    scales = [w * layer.scale for w, layer in zip(weights, own, strict=True)]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    A = merge_vectors([_flat(x.A) for x in own], signed, thinning, place=f"{module}|A")
    B = merge_vectors([_flat(x.B) for x in own], roots, thinning, place=f"{module}|B")
    return LowRank(B=B, A=A)


def _merge_changes(
    module: str, own: Sequence[StoredLayer], weights: Sequence[float], how: Combination
) -> LowRank:
    """The sum of the changes, whole or compressed, or their element-wise merge compressed."""
    changes = [layer.to_change() for layer in own]
    rank = how.rank or max(layer.rank for layer in own)
    if how.kind in CHANGE_KINDS:
        method = how.kind.removesuffix("-svd")
        thinning = Thinning(method=method, density=how.density or 1.0, seed=how.seed)
        full = merge_vectors([x.to_matrix() for x in changes], weights, thinning, place=module)
        return compress_matrix(full, rank)
    total = add_changes(changes, weights)
    if how.kind == "svd":
        return compress_change(total, rank)
    # No matrix has a rank above its shorter side, so compressing to that is exact too.
    return compress_change(total, total.rank) if total.rank > min(total.sizes) else total


def _flat(factor: Tensor) -> Tensor:
    return factor.double().flatten(1)


def _measure(
    layer: StoredLayer, parents: Sequence[StoredLayer | None], weights: Sequence[float]
) -> CombinedLayer:
    """How far a written layer lies from the weighted sum of its parents."""
    pairs = [(each, w) for each, w in zip(parents, weights, strict=True) if each is not None]
    wanted = add_changes([each.to_change() for each, _ in pairs], [w for _, w in pairs])
    norm, off = norm_of(wanted), distance(layer.to_change(), wanted)
    # Where changes cancel, what is left of rounding counts as nothing beside the parents.
    size = max(abs(w) * norm_of(each.to_change()) for each, w in pairs)
    error = off / norm if norm > 1e-9 * size else (0.0 if off <= 1e-6 * size else math.inf)
    return CombinedLayer(rank=layer.rank, norm=norm, error=error)


def _to_config(
    adapters: Sequence[StoredAdapter], layers: Mapping[str, StoredLayer], base: str | None
) -> dict[str, Any]:
    """PEFT's configuration with alpha = rank, so that every scale is 1."""
    ranks = {module: layer.rank for module, layer in layers.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # A key that begins with ^ is this module alone and no other with the same ending.
    odd = {f"^{m}": r for m, r in ranks.items() if r != usual}
    saved = sorted({name for each in adapters for name in each.config.get("modules_to_save") or ()})
    return {
        **adapters[0].config,
        "base_model_name_or_path": base or adapters[0].base,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": list(layers),
        "exclude_modules": None,
        "modules_to_save": saved or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _to_lineage(adapters: Sequence[StoredAdapter], how: Combination) -> dict[str, Any]:
    """What all parents agree on, who they are, and how they were combined."""
    first = adapters[0].lineage
    own = ("format", "base", "files", "parents", "combination")
    agreed = {
        key: value
        for key, value in first.items()
        if key not in own and all(each.lineage.get(key) == value for each in adapters)
    }
    parents = [
        {
            "folder": str(each.folder),
            "weight": weight,
            "sha256": {file: each.digests[file] for file in sorted(each.digests)},
        }
        for each, weight in zip(adapters, how.weights, strict=True)
    ]
    recorded = {"kind": how.kind, "rank": how.rank, "density": how.density, "seed": how.seed}
    return {**agreed, "parents": parents, "combination": recorded}
