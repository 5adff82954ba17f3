"""``lorakeet verify`` and ``rerun``: proofs as tables.  A failed proof exits with 1."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.output import CONSOLE, print_done, print_error, print_json, print_table
from lorakeet.cli.trust import Trust

APP = typer.Typer(no_args_is_help=True)

Run = Annotated[Path, typer.Argument(help="The folder of a run.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
FAILED = 1


@APP.command()
def adapter(
    path: Annotated[Path, typer.Argument(help="An adapter folder, or the folder of a run.")],
    base: Annotated[
        str | None, typer.Option(help="Instead of the base that the adapter names.")
    ] = None,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Check an adapter's hashes, base and numbers, and that it answers the same when reloaded."""
    from lorakeet.api.proofs.adapter import verify_adapter

    _show(verify_adapter(path, base=base), as_json)


@APP.command()
def accumulation(
    place: Annotated[Path, typer.Argument(help="A recipe file, or the folder of a run.")],
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Compare one step cut as 1 x 8, 2 x 4 and 8 x 1: the gradients must be the same."""
    from lorakeet.api.proofs.cuts import verify_accumulation

    _show(verify_accumulation(place), as_json)


@APP.command()
def packing(
    place: Annotated[Path, typer.Argument(help="A recipe file, or the folder of a run.")],
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Compare one step packed, padded and one sample by one: the gradients must be the same."""
    from lorakeet.api.proofs.cuts import verify_packing

    _show(verify_packing(place), as_json)


@APP.command()
def resume(
    run: Run,
    steps: Annotated[int, typer.Option(help="Optimiser steps before and after the stop.")] = 4,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Train 2k steps straight, and k, a stop and k more: the bytes must be the same."""
    from lorakeet.api.proofs.resume import verify_resume

    _show(verify_resume(run, steps=steps), as_json)


@APP.command()
def merge(
    run: Run,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Merge into a temporary folder and compare its answers, from disk in a fresh process."""
    from lorakeet.api.proofs.merge import verify_merge

    _show(verify_merge(run, dtype=dtype), as_json)


@APP.command()
def data(run: Run, as_json: Json = False, trust: Trust = False) -> None:
    """Read the sources again: every row must be trained, validated or listed as dropped."""
    from lorakeet.api.proofs.data import verify_data

    _show(verify_data(run), as_json)


def rerun(
    run: Run,
    into: Annotated[Path, typer.Option(help="A new folder for the second run.")],
    force: Annotated[
        bool, typer.Option("--force", help="Train although base or data have changed.")
    ] = False,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Train a run again from its resolved.yaml: the adapter must be the same, bit for bit."""
    from lorakeet.api.rerun import rerun as start
    from lorakeet.cli.interrupt import watch_signals
    from lorakeet.monitor.console import RunConsole

    with watch_signals() as stop_requested, RunConsole(is_quiet=as_json) as console:
        proof = start(run, into, force=force, emit=console.emit, stop_requested=stop_requested)
    _show(proof, as_json)


def _show(proof: Any, as_json: bool) -> None:
    """The verdict with its figures.

    Raises:
        typer.Exit: with code 1 when the proof failed.
    """
    if as_json:
        print_json(proof.to_dict())
    else:
        rows = [
            (name.replace("_", " "), _to_text(figure), _to_text(proof.tolerances.get(name, "")))
            for name, figure in proof.figures.items()
            if not isinstance(figure, dict)
        ]
        print_table(f"verify {proof.name}", ("figure", "found", "at most"), rows)
        for note in proof.notes:
            CONSOLE.print(f"[yellow]note[/] {note}", soft_wrap=True, markup=True)
        for problem in proof.problems:
            print_error(problem)
        if proof.passed:
            print_done(f"proved: {proof.compared}")
    if not proof.passed:
        raise typer.Exit(FAILED)


def _to_text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
