"""Adapters on the disk: list, show, compare and combine them, and see what targets select."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.base.errors import FileFormatError, RequestError


@dataclass(frozen=True, kw_only=True)
class ListedAdapter:
    """One line of a list.

    Args:
        kind: LoRA, DoRA, rsLoRA, rsLoRA + DoRA, AdaLoRA or VeRA.
        ranks: all r that occur, ascending.
        targets: the last parts of the adapted modules' names.
        num_bytes: of the weights.
        parents: folders (or other names) of the adapters that it was made from.
        problem: why it cannot be read, or None.
    """

    folder: str
    kind: str = "LoRA"
    ranks: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()
    base: str = ""
    num_bytes: int = 0
    parents: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShownAdapter:
    """All that an adapter folder tells about itself.

    Args:
        settings: as in ``Lora``.
        layers: module -> rank, scale, sizes and the norm of s B A.
        others: names of tensors that are no factors, such as a trained head.
        is_verified: whether the folder lists hashes, which were then right.
        notes: what else changes the layers beside s B A.
    """

    folder: str
    kind: str
    base: str
    settings: dict[str, Any]
    num_parameters: int
    layers: dict[str, dict[str, Any]]
    others: tuple[str, ...]
    digests: dict[str, str]
    is_verified: bool
    lineage: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SelectedTarget:
    """One module that a pattern selects, and what an adapter would add there."""

    module: str
    num_in: int
    num_out: int
    rank: int
    parameters: int


def list_adapters(folder: str | Path) -> list[ListedAdapter]:
    """Every adapter at or below a folder, in the order of their names; damaged ones too.

    Raises:
        RequestError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise RequestError(f"{root}: there is no such folder. Name one that holds adapters.")
    places = [
        Path(place)
        for place, inner, files in os.walk(root)
        if _hide(inner) and "adapter_config.json" in files
    ]
    return [_to_line(place, place.relative_to(root).as_posix()) for place in sorted(places)]


def show_adapter(folder: str | Path) -> ShownAdapter:
    """Settings, layers with their norms, hashes and lineage of one adapter.

    Raises:
        FileFormatError: the folder is no whole adapter.
    """
    from lorakeet.adapters.compare import measure_norms
    from lorakeet.adapters.stored import read_stored

    adapter = read_stored(folder)
    norms = measure_norms(adapter)
    layers = {
        module: {
            "rank": layer.rank,
            "scale": layer.scale,
            "in": layer.A[0].numel(),
            "out": layer.B.shape[0],
            "norm": norms[module],
        }
        for module, layer in adapter.layers.items()
    }
    return ShownAdapter(
        folder=str(folder), kind=_to_kind(adapter.config), base=adapter.base,
        settings=asdict(adapter.settings),
        num_parameters=adapter.num_parameters, layers=layers, others=tuple(sorted(adapter.others)),
        digests=adapter.digests, is_verified=bool(adapter.lineage),
        lineage={k: v for k, v in adapter.lineage.items() if k not in ("files", "format", "seal")},
        notes=tuple(adapter.beside_factors),
    )  # fmt: skip


def diff_adapters(one: str | Path, other: str | Path) -> tuple[Any, dict[str, Any]]:
    """(all layers as one, each layer) of ``adapters.compare.LayerDifference``.

    Raises:
        FileFormatError: a folder is no whole adapter.
        RequestError: they belong to bases of different sizes.
    """
    from lorakeet.adapters.compare import compare_adapters, sum_up
    from lorakeet.adapters.stored import read_stored

    layers = compare_adapters(read_stored(one), read_stored(other))
    return sum_up(layers), layers


def combine_adapters(
    adapters: Mapping[str | Path, float],
    out: str | Path,
    *,
    base: str | None = None,
    kind: str = "concatenation",
    **options: Any,
) -> dict[str, Any]:
    """Writes one adapter made of several.

    Args:
        adapters: folder -> weight; a negative weight subtracts.
        base: states the base that all belong to, where their files name it differently.
        kind: one of ``adapters.combination.KINDS``.
        options: ``rank``, ``density`` and ``seed`` of ``adapters.combination.Combination``.

    Returns:
        module -> ``adapters.combine.CombinedLayer``.

    Raises:
        RequestError: they do not go together; every reason is listed.
        FileFormatError: a folder is no whole adapter.
    """
    from lorakeet.adapters.combination import Combination
    from lorakeet.adapters.combine import combine

    how = Combination(kind=kind, weights=tuple(adapters.values()), **options)
    return combine(list(adapters), out, how, base=base)


def select_targets_of(base: str, settings: Any, *, task: str = "chat") -> list[SelectedTarget]:
    """What an adapter's targets select on a base, from its configuration and without weights.

    Args:
        settings: ``Lora``.

    Raises:
        RequestError: nothing matches (with near names), or a pattern is malformed.
    """
    from lorakeet.adapters.targets import select_targets, sizes_at
    from lorakeet.models.load import build_without_weights

    model = build_without_weights(base, task=task)
    found = []
    for module in select_targets(model, settings):
        num_in, num_out, count = sizes_at(model, module)
        r = settings.rank_of(module)
        found.append(
            SelectedTarget(
                module=module, num_in=num_in, num_out=num_out, rank=r,
                parameters=count * r * (num_in + num_out),
            )
        )  # fmt: skip
    return found


def _hide(inner: list[str]) -> bool:
    """Keeps a walk out of hidden folders, which hold half-written adapters; always True."""
    inner[:] = [name for name in inner if not name.startswith(".")]
    return True


def _to_kind(config: Mapping[str, Any]) -> str:
    """The method's name behind PEFT's keys."""
    known = {"ADALORA": "AdaLoRA", "VERA": "VeRA"}
    plain = "rsLoRA" if config.get("use_rslora") else "LoRA"
    if config.get("use_dora"):
        return "DoRA" if plain == "LoRA" else "rsLoRA + DoRA"
    return known.get(str(config.get("peft_type")), plain)


def _to_line(folder: Path, name: str) -> ListedAdapter:
    """One adapter's line; one that cannot be read gets its reason."""
    from lorakeet.adapters.files import read_adapter_config
    from lorakeet.adapters.peft_config import from_peft_config
    from lorakeet.adapters.stored import read_lineage
    from lorakeet.adapters.weights import weight_files

    try:
        config = read_adapter_config(folder)
        settings = from_peft_config(config, folder)
        lineage = read_lineage(folder)
    except FileFormatError as error:
        return ListedAdapter(folder=name, problem=str(error))
    targets = settings.targets
    ends = [targets] if isinstance(targets, str) else [path.rsplit(".", 1)[-1] for path in targets]
    return ListedAdapter(
        folder=name,
        kind=_to_kind(config),
        ranks=tuple(sorted({settings.rank, *settings.rank_pattern.values()})),
        targets=tuple(dict.fromkeys(ends)),
        base=str(config.get("base_model_name_or_path")),
        num_bytes=sum((folder / file).stat().st_size for file in weight_files(folder)),
        parents=tuple(str(parent.get("folder")) for parent in lineage.get("parents") or ()),
    )
