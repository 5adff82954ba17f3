"""``lorakeet runs``: what has been run below a folder, side by side."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.output import CONSOLE, print_done, print_error, print_json, print_table

APP = typer.Typer(no_args_is_help=True)
Root = Annotated[Path, typer.Option(help="The folder that holds the runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
RUNS = Path("runs")
SHOWN_DIGITS = 12


@APP.command("list")
def list_(root: Root = RUNS, as_json: AsJson = False) -> None:
    """List runs, adapters and merged models with their state and scores."""
    from lorakeet.api.runs import list_runs

    entries = list_runs(root)
    if as_json:
        print_json([entry.to_dict() for entry in entries])
        return
    rows = [
        (e.name, e.kind, e.state, e.method, e.steps or "-", _to_time(e.created), _best_of(e))
        for e in entries
    ]
    columns = ("name", "kind", "state", "method", "steps", "begun", "score")
    print_table(f"{len(rows)} entries in {root}", columns, rows)


@APP.command()
def show(
    run: Annotated[str, typer.Argument(help="A name from the list, or a folder.")],
    root: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Show everything on record about one run, adapter or model."""
    from lorakeet.api.runs import find_run

    entry = find_run(run, root)
    if as_json:
        print_json(entry.to_dict())
        return
    facts = {
        "folder": entry.folder, "kind": entry.kind, "state": entry.state, "base": entry.base,
        "method": entry.method, "steps": entry.steps, "begun": _to_time(entry.created),
        "ended": _to_time(entry.finished), "problem": entry.problem,
    }  # fmt: skip
    CONSOLE.print(entry.name, style="bold", markup=False)
    for key, value in facts.items():
        if value not in ("", 0):
            CONSOLE.print(f"  {key}: {value}", markup=False, soft_wrap=True)
    for parent in entry.parents:
        digest = f" {parent['sha256'][:SHOWN_DIGITS]}" if parent.get("sha256") else ""
        CONSOLE.print(f"  {parent.get('relation', 'from')}: {parent['folder']}{digest}",
                      markup=False, soft_wrap=True)  # fmt: skip
    for title, content in (("score", entry.scores), ("SHA-256", entry.hashes)):
        if content:
            print_table("", (title, "value"), [(k, _to_cell(v)) for k, v in content.items()])


@APP.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Two or more names or folders.")],
    root: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Compare runs side by side: the settings that differ, the scores, the hashes."""
    from lorakeet.api.runs import compare_runs

    found = compare_runs(runs, root)
    if as_json:
        print_json({"runs": [entry.to_dict() for entry in found.entries],
                    "settings": found.settings, "scores": found.scores,
                    "hashes": found.hashes})  # fmt: skip
        return
    names = [entry.name for entry in found.entries]
    states = [("state", *(entry.state for entry in found.entries))]
    for title, rows in (
        ("Settings that differ", found.settings), ("Scores", found.scores),
        ("Hashes that differ", found.hashes),
    ):  # fmt: skip
        lines = [(key, *(_to_cell(value) for value in row)) for key, row in rows.items()]
        if lines or title.startswith("Settings"):
            first = states if title.startswith("Settings") else []
            print_table(title, ("what", *names), [*first, *lines])


@APP.command()
def remove(
    run: Annotated[str, typer.Argument(help="A name from the list, or a folder.")],
    root: Root = RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a run: its folder and its row. A run that is being written is refused."""
    from lorakeet.api.runs import find_run, remove_run

    entry = find_run(run, root)
    if not yes:
        typer.confirm(f"Remove {entry.folder} ({entry.kind}, {entry.state})?", abort=True)
    remove_run(run, root)
    print_done(f"{entry.folder} is removed")


@APP.command()
def scan(
    folder: Annotated[Path, typer.Argument(help="Runs at or below it are written down.")] = RUNS,
    as_json: AsJson = False,
) -> None:
    """Build the registry again from the folders that are there."""
    from lorakeet.api.runs import scan_runs

    found = scan_runs(folder)
    if as_json:
        entries = [entry.to_dict() for entry in found.entries]
        print_json({"entries": entries, "problems": list(found.problems)})
        return
    for problem in found.problems:
        print_error(problem)
    print_done(f"{len(found.entries)} entries are on record; 'lorakeet runs list --root {folder}'")


def _to_time(seconds: float | None) -> str:
    """A moment in the reader's own time zone."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else "-"


def _best_of(entry: Any) -> str:
    """The figure that a list has room for."""
    for name in ("domain tuned", "classification accuracy", "validation perplexity",
                 "validation accuracy", "validation loss"):  # fmt: skip
        if name in entry.scores:
            return f"{name.removeprefix('validation ')} {entry.scores[name]:.4g}"
    return "-"


def _to_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, str) and len(value) == 64 and value.isalnum():
        return value[:SHOWN_DIGITS]
    return "-" if value is None else str(value)
