"""``lorakeet adapters``: list, show, compare and combine adapters, and try out targets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.base.errors import RequestError
from lorakeet.base.units import to_readable_bytes, to_readable_count
from lorakeet.cli.output import CONSOLE, print_done, print_error, print_json, print_table

APP = typer.Typer(no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
_PATTERNS = ("rank_pattern", "alpha_pattern")
_TOLD = ("targets", "dora", "rslora", "vera", "start", *_PATTERNS)
_OFF = (None, False, 0.0, "none", (), {})
Adapter = Annotated[Path, typer.Argument(help="An adapter folder.")]


@APP.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(help="Adapters at or below it are listed.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """List adapters with rank, targets, base, size and parents."""
    from dataclasses import asdict

    from lorakeet.api.adapters import list_adapters

    found = list_adapters(folder)
    if as_json:
        print_json([asdict(each) for each in found])
        return
    rows = [
        (
            each.folder, each.kind, _range(each.ranks), ", ".join(each.targets), each.base,
            to_readable_bytes(each.num_bytes),
            ", ".join(_within(parent, folder) for parent in each.parents) or "-",
        )
        for each in found
        if each.problem is None
    ]  # fmt: skip
    columns = ("adapter", "kind", "rank", "targets", "base", "size", "parents")
    words = ("kind", "targets", "base", "parents")
    print_table(f"{len(rows)} adapters below {folder}", columns, rows, words=words)
    for each in found:
        if each.problem:
            print_error(each.problem)


@APP.command()
def show(adapter: Adapter, as_json: AsJson = False) -> None:
    """Show an adapter's settings, layers with norms, verified hashes and lineage."""
    from dataclasses import asdict

    from lorakeet.api.adapters import show_adapter

    shown = show_adapter(adapter)
    if as_json:
        print_json(asdict(shown))
        return
    settings = {k: v for k, v in shown.settings.items() if k not in _TOLD and v not in _OFF}
    settings |= {k: f"of {len(shown.settings[k])} modules" for k in _PATTERNS if shown.settings[k]}
    verified = (
        "right, by lorakeet.json" if shown.is_verified else "none recorded (no lorakeet.json)"
    )
    told = {k: v for k, v in shown.lineage.items() if k not in ("base", "parents") and v}
    facts = {
        "base": shown.base,
        "kind": shown.kind,
        "parameters": f"{shown.num_parameters:,}",
        **settings,
        "hashes": verified,
        **shown.digests,
        **told,
    }
    CONSOLE.print(str(adapter), style="bold", markup=False)
    for key, value in facts.items():
        CONSOLE.print(f"  {key}: {_to_words(value)}", markup=False)
    for parent in shown.lineage.get("parents") or ():
        digest = max(parent["sha256"].items())[1][:16]  # of the weights, or of their last shard
        CONSOLE.print(f"  parent {parent['folder']} x {parent['weight']:g}, SHA-256 {digest}")
    prefix, short = _shorten(shown.layers)
    rows = [
        (short[m], each["rank"], f"{each['in']} > {each['out']}", f"{each['scale']:.3g}",
         f"{each['norm']:.4g}")
        for m, each in _in_order(shown.layers)
    ]  # fmt: skip
    columns = ("layer", "rank", "in > out", "scale", "norm of s B A")
    print_table(f"{len(rows)} layers{prefix}", columns, rows)
    held = [n for n in shown.others if not n.endswith(".lora_magnitude_vector")]
    others = Counter(_to_alike(name.removeprefix("base_model.model.")) for name in held)
    for name, count in others.items():
        times = f", {count} times" if count > 1 else ""
        CONSOLE.print(f"  also holds {name}{times}", markup=False)
    for note in shown.notes:
        CONSOLE.print(f"  note: {note}; norms are those of s B A alone")


@APP.command()
def diff(
    one: Adapter,
    other: Annotated[Path, typer.Argument(help="Another adapter of the same base.")],
    as_json: AsJson = False,
) -> None:
    """Compare two adapters by norm, cosine and subspace overlap, layer by layer."""
    from dataclasses import asdict

    from lorakeet.api.adapters import diff_adapters

    whole, layers = diff_adapters(one, other)
    if as_json:
        print_json({"whole": asdict(whole), "layers": {m: asdict(d) for m, d in layers.items()}})
        return
    prefix, short = _shorten(layers)
    rows = [(short[module], *_to_cells(each)) for module, each in _in_order(layers)]
    columns = ("layer", "norm 1", "norm 2", "distance", "cosine", "input", "output")
    title = f"1: {one}   2: {other}   {len(rows)} layers{prefix}"
    print_table(title, columns, [*rows, ("all", *_to_cells(whole))])
    chance = [0.0 if each is None else each.chance for each in (whole.inputs, whole.outputs)]
    CONSOLE.print(
        "input and output: overlap phi of the rows of A and of the columns of B, 0 to 1 "
        f"(arXiv:2106.09685, section 7.2); random ones share {chance[0]:.2f} and {chance[1]:.2f}",
        style="dim",
    )


@APP.command()
def combine(
    adapters: Annotated[list[str], typer.Argument(help="FOLDER or FOLDER=WEIGHT, repeatable.")],
    out: Annotated[Path, typer.Option(help="A new folder for the combined adapter.")],
    kind: Annotated[
        str, typer.Option(help="concatenation, svd, linear, ties, dare, dare-ties, or ..-svd.")
    ] = "concatenation",
    rank: Annotated[int | None, typer.Option(help="Of the result, for svd kinds.")] = None,
    density: Annotated[float | None, typer.Option(help="Share kept, for ties and dare.")] = None,
    seed: Annotated[int, typer.Option(help="Of dare's random drops.")] = 0,
    base: Annotated[str | None, typer.Option(help="The base that all belong to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Combine adapters into one; a negative weight subtracts, one adapter alone is scaled."""
    from dataclasses import asdict

    from lorakeet.api.adapters import combine_adapters

    layers = combine_adapters(
        _to_weights(adapters), out, base=base, kind=kind, rank=rank, density=density, seed=seed
    )
    if as_json:
        print_json({module: asdict(layer) for module, layer in layers.items()})
        return
    prefix, short = _shorten(layers)
    rows = [(short[m], r.rank, f"{r.norm:.4g}", f"{r.error:.2e}") for m, r in _in_order(layers)]
    print_table(f"{len(rows)} layers{prefix}", ("layer", "rank", "norm of sum", "error"), rows)
    CONSOLE.print("error: distance from the weighted sum, as a share of its norm", style="dim")
    print_done(f"{out} holds the combination ({kind}) with its parents in lorakeet.json")


@APP.command()
def targets(
    base: Annotated[str, typer.Argument(help="A folder, a Hub id, ms://owner/name, or starter.")],
    pattern: Annotated[
        list[str] | None, typer.Option(help="A name or regular expression; repeat for names.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Names to pass over.")] = None,
    rank: Annotated[int, typer.Option(help="r, for the parameter counts.")] = 16,
    task: Annotated[str, typer.Option(help="chat, text or classify.")] = "chat",
    as_json: AsJson = False,
) -> None:
    """Show what a target pattern selects on a base, with parameter counts; needs no weights."""
    from dataclasses import asdict

    from lorakeet.adapters.settings import ALL_LINEAR, Lora
    from lorakeet.api.adapters import select_targets_of

    names = pattern or [ALL_LINEAR]
    chosen = names[0] if len(names) == 1 else tuple(names)
    settings = Lora(rank=rank, targets=chosen, exclude=tuple(exclude or ()))
    found = select_targets_of(base, settings, task=task)
    total = sum(each.parameters for each in found)
    if as_json:
        print_json({"targets": [asdict(each) for each in found], "parameters": total})
        return
    groups: dict[tuple[str, int, int], list[int]] = {}
    for each in found:
        alike = _to_alike(each.module)
        groups.setdefault((alike, each.num_in, each.num_out), []).append(each.parameters)
    rows = [
        (alike, len(counts), f"{num_in} > {num_out}", f"{sum(counts):,}")
        for (alike, num_in, num_out), counts in groups.items()
    ]
    title = f"{', '.join(names)} on {base}, rank {rank}"
    print_table(title, ("modules", "number", "in > out", "parameters"), rows)
    CONSOLE.print(f"  {len(found)} modules, {to_readable_count(total)} parameters ({total:,})")


def _within(place: str, folder: Path) -> str:
    """A path from a folder on, where it lies in it."""
    inner = Path(place)
    return str(inner.relative_to(folder)) if inner.is_relative_to(folder) else place


def _to_alike(name: str) -> str:
    """A name with ``*`` for its numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _in_order(layers: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Layers by number, so that 2 comes before 10."""

    def place(item: tuple[str, Any]) -> list[tuple[int, str]]:
        return [(int(part) if part.isdigit() else -1, part) for part in item[0].split(".")]

    return sorted(layers.items(), key=place)


def _to_weights(words: list[str]) -> dict[str | Path, float]:
    """``FOLDER=WEIGHT`` words; a folder alone has the weight 1.

    Raises:
        RequestError: a weight is no number, or a folder stands twice; all are listed.
    """
    weights: dict[str | Path, float] = {}
    problems = []
    for word in words:
        folder, equals, number = word.rpartition("=")
        path = folder if equals else word
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            problems.append(f"{word}: '{number}' is no number; needed FOLDER=WEIGHT.")
            continue
        if path in weights:
            problems.append(f"{path} is named twice; give it once with the sum of its weights.")
        weights[path] = weight
    if problems:
        raise RequestError("\n".join(problems))
    return weights


def _to_cells(row: Any) -> tuple[str, ...]:
    """The figures of one layer's difference."""
    norms = [f"{norm:.3g}" for norm in (*row.norms, row.distance)]
    cosine = "-" if row.cosine is None else f"{row.cosine:.3f}"
    spaces = ["-" if one is None else f"{one.phi:.2f}" for one in (row.inputs, row.outputs)]
    return (*norms, cosine, *spaces)


def _shorten(modules: Any) -> tuple[str, dict[str, str]]:
    """(a note on what all names begin with, name -> the rest), so that tables stay narrow."""
    names = list(modules)
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while parts and all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    prefix = ".".join(parts[0][:shared]) if parts else ""
    note = f" of {prefix}" if prefix else ""
    return note, {name: ".".join(name.split(".")[shared:]) for name in names}


def _to_words(value: Any) -> str:
    """A value of a lineage in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_to_words(own)}" for key, own in value.items())
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:16]  # enough to compare with the eyes
    return ", ".join(map(_to_words, value)) if isinstance(value, (list, tuple)) else str(value)


def _range(ranks: tuple[int, ...]) -> str:
    """``8``, or ``4 to 16``."""
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
