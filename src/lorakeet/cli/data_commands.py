"""``lorakeet data``: check, show, build."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lorakeet.cli.output import CONSOLE, print_done, print_json, print_table

APP = typer.Typer(no_args_is_help=True)

Paths = Annotated[list[str], typer.Argument(help="Files, folders or globs.")]
Base = Annotated[str, typer.Option(help="Whose tokenizer and chat template to use.")]
Task = Annotated[str, typer.Option(help="chat, text or classify.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
Window = Annotated[int, typer.Option("--max-tokens", help="The window of one sample.")]


@APP.command()
def check(
    paths: Paths, base: Base = "starter", task: Task = "chat", max_tokens: Window = 1024,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Read, clean and lint data; list what would be dropped and why."""
    with tempfile.TemporaryDirectory() as folder:
        report = _prepare(paths, base, task, max_tokens, Path(folder)).report
    if as_json:
        print_json(report)
        return
    print_report(report)


@APP.command()
def build(
    paths: Paths,
    out: Annotated[Path, typer.Option(help="A folder for shards, report and dropped rows.")],
    base: Base = "starter", task: Task = "chat", max_tokens: Window = 1024, as_json: Json = False,
) -> None:  # fmt: skip
    """Turn data into shards of tokens, with its report and its dropped rows."""
    report = _prepare(paths, base, task, max_tokens, out).report
    if as_json:
        print_json(report)
        return
    print_report(report)
    print_done(f"shards, report.json and dropped.jsonl are in {out}")


@APP.command()
def show(
    paths: Paths, base: Base = "starter", task: Task = "chat", max_tokens: Window = 1024,
    count: Annotated[int, typer.Option(help="How many samples.")] = 3,
    skip: Annotated[int, typer.Option(help="How many to pass over first.")] = 0,
) -> None:  # fmt: skip
    """Show samples as the model sees them, with the trained tokens coloured."""
    from lorakeet.data.show import legend, render_sources
    from lorakeet.models.load import read_tokenizer

    recipe = _recipe(paths, base, task, max_tokens)
    CONSOLE.print(legend())
    for title, text in render_sources(recipe, read_tokenizer(base), skip=skip, count=count):
        CONSOLE.rule(title, align="left")
        CONSOLE.print(text, soft_wrap=True)


def print_report(report: dict[str, Any]) -> None:
    """The data report as tables: counts, dropped rows by reason, warnings."""
    tokens = report["tokens"]
    rows = [
        ("samples", f"{report['num_samples']:,}"),
        ("rows dropped", f"{report['num_dropped']:,}"),
        ("schemas", ", ".join(f"{name} {n}" for name, n in report["schemas"].items())),
        ("languages", ", ".join(f"{k} {100 * v:.0f} %" for k, v in report["languages"].items())),
        ("tokens", f"{tokens['total']:,}"),
        ("trained tokens", f"{tokens['trained']:,} ({100 * tokens['trained_fraction']:.0f} %)"),
        ("length", f"median {tokens['median']}, longest {tokens['max']}"),
        ("private data masked", str(sum(report["private_data_masked"].values()))),
    ]
    print_table("Data", ("what", "figure"), rows)
    dropped = [(code, entry["rows"], entry["example"]) for code, entry in report["dropped"].items()]
    if dropped:
        print_table("Dropped or cut", ("reason", "rows", "such as"), dropped)
    for warning in report["warnings"]:
        CONSOLE.print(f"[yellow]note[/] {escape(warning)}", soft_wrap=True)


def _recipe(paths: list[str], base: str, task: str, max_tokens: int) -> Any:
    """A recipe of defaults around the given data."""
    from lorakeet.base.recipe_file import recipe_from_dict

    return recipe_from_dict(
        {"base": base, "task": task, "data": {"train": paths, "max_tokens": max_tokens}}
    )


def _prepare(paths: list[str], base: str, task: str, max_tokens: int, folder: Path) -> Any:
    """The data stage alone."""
    from lorakeet.api.planning import check_data
    from lorakeet.monitor.console import RunConsole

    with RunConsole() as console:
        return check_data(_recipe(paths, base, task, max_tokens), folder, emit=console.emit)
