"""A run and what it left: ``lorakeet quickstart``, ``train``, ``resume``, ``eval``, ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.output import CONSOLE, print_done, print_json, print_table
from lorakeet.cli.trust import Trust

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value at the end.")]
Run = Annotated[Path, typer.Argument(help="The folder of a run.")]
OtherBase = Annotated[
    bool,
    typer.Option("--other-base", help="Take a base with other bytes than training's all the same."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, such as method.rank=32.")
]


def quickstart(
    run: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/quickstart"),
    as_json: Json = False,
) -> None:
    """Documents to a served specialist in minutes, on the embedded starter model."""
    from lorakeet.pipeline import EMBEDDED

    _run_stages("Quickstart", EMBEDDED / "recipe.yaml", run, as_json)


def run_all(
    recipe: Annotated[Path, typer.Argument(help="A recipe file; 'lorakeet new' writes one.")],
    run: Annotated[Path, typer.Option(help="The run folder; a stopped run goes on.")],
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """All stages: train, evaluate, merge and verify, ask over HTTP, report."""
    _run_stages("Run", recipe, run, as_json)


def _run_stages(title: str, recipe: Path, run: Path, as_json: bool) -> None:
    """Every stage that is not fresh, with a closing table."""
    from lorakeet.cli.interrupt import watch_signals
    from lorakeet.monitor.console import RunConsole
    from lorakeet.pipeline import run_all as start

    with watch_signals() as stop_requested, RunConsole(is_quiet=as_json) as console:
        outcome = start(recipe, run, emit=console.emit, stop_requested=stop_requested)
    if as_json:
        print_json(outcome)
        return
    if outcome["served"]:
        _print_answers(outcome["served"])
    print_table(title, ("what", "figure"), list(outcome["figures"].items()))
    print_done(f"the report is {outcome['report']}")


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file; 'lorakeet new' writes one.")],
    run: Annotated[Path, typer.Option(help="A new folder for everything the run leaves.")],
    settings: Settings = None,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Train what a recipe asks for."""
    from lorakeet.api.training import train as start
    from lorakeet.cli.interrupt import watch_signals
    from lorakeet.monitor.console import RunConsole

    with watch_signals() as stop_requested, RunConsole(is_quiet=as_json) as console:
        trained = start(
            recipe, run, overrides=settings or [], emit=console.emit,
            stop_requested=stop_requested,
        )  # fmt: skip
    _print_trained(trained, as_json)


def resume(run: Run, as_json: Json = False, trust: Trust = False) -> None:
    """Go on from the newest good checkpoint of a run."""
    from lorakeet.api.training import resume as go_on
    from lorakeet.cli.interrupt import watch_signals
    from lorakeet.monitor.console import RunConsole

    with watch_signals() as stop_requested, RunConsole(is_quiet=as_json) as console:
        trained = go_on(run, emit=console.emit, stop_requested=stop_requested)
    _print_trained(trained, as_json)


def evaluate(
    run: Run, other_base: OtherBase = False, as_json: Json = False, trust: Trust = False
) -> None:
    """Ask base and tuned model the same questions; write evaluation.json and the report."""
    from lorakeet.api.evaluation import evaluate as score
    from lorakeet.monitor.console import RunConsole

    with RunConsole(is_quiet=as_json) as console:
        result = score(run, emit=console.emit, other_base=other_base)
    if as_json:
        print_json(result)
        return
    print_evaluation(result)
    print_done(f"scores are in {run}/evaluation.json, the page is {run}/report.html")


def report(run: Run) -> None:
    """Write the run's page again from what lies in its folder."""
    from lorakeet.base.run_folder import RunFolder
    from lorakeet.evaluate.report import write_report

    print_done(f"the report is {write_report(RunFolder(run))}")


def print_evaluation(result: dict[str, Any]) -> None:
    """Scores of base and tuned model as one table, then what was forgotten."""
    rows = []
    for name in ("domain", "general"):
        if name in result:
            pair = [result[name][side]["accuracy"] for side in ("base", "tuned")]
            rows.append((f"{name} accuracy", *(f"{100 * value:.1f} %" for value in pair)))
    if "perplexity" in result:
        pair = [result["perplexity"][side]["perplexity"] for side in ("base", "tuned")]
        rows.append(("validation perplexity", *(f"{value:.2f}" for value in pair)))
    if rows:
        print_table("Evaluation", ("what", "base", "tuned"), rows)
    if "classification" in result:
        found = result["classification"]
        rows = [("accuracy", f"{100 * found['accuracy']:.1f} %"),
                ("macro F1", f"{100 * found['macro_f1']:.1f} %")]  # fmt: skip
        print_table("Classification", ("what", "figure"), rows)
    if "retention" in result:
        CONSOLE.print(str(result["retention"].get("verdict", "")), soft_wrap=True)


def _print_trained(trained: Any, as_json: bool) -> None:
    """Where the result lies and what its validation said."""
    if as_json:
        print_json({"adapter": str(trained.adapter), "metrics": trained.metrics,
                    "folder": str(trained.folder), "steps": trained.steps,
                    "stopped_because": trained.stopped_because})  # fmt: skip
        return
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in trained.metrics.items())
    print_done(
        f"{trained.steps} steps; {trained.stopped_because} Best: {metrics or 'no validation'}."
    )
    print_done(f"the result is in {trained.adapter}; next: 'lorakeet eval {trained.folder}'")


def _print_answers(served: list[dict[str, str]]) -> None:
    """Questions asked over HTTP with both answers."""
    keys = ("question", "expected", "base", "tuned")
    rows = [tuple(item.get(key) or "-" for key in keys) for item in served]
    print_table("Asked over HTTP", ("question", "expected", "base", "specialist"), rows)
