"""Before a run: ``lorakeet new``, ``doctor`` and ``plan``; none of them imports torch.

Only ``plan --measure`` and ``plan --learning-rate`` train, the former in a child process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.base.errors import RequestError
from lorakeet.base.run_folder import write_json
from lorakeet.cli.output import CONSOLE, print_done, print_json, print_table
from lorakeet.cli.trust import Trust

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, such as method.rank=32.")
]


def new(
    path: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    base: Annotated[str, typer.Option(help="A folder, a Hub id, ms://owner/name.")] = "starter",
    data: Annotated[list[str] | None, typer.Option(help="Training files or folders.")] = None,
    task: Annotated[str, typer.Option(help="chat, text or classify.")] = "chat",
) -> None:
    """Write a commented recipe with every default and its reason."""
    from lorakeet.base.recipe_file import recipe_from_dict, to_commented_yaml
    from lorakeet.base.run_folder import write_text

    if path.exists():
        raise RequestError(f"{path}: there is such a file already. Choose another name.")
    recipe = recipe_from_dict(
        {"base": base, "task": task, "data": {"train": data or ["data.jsonl"]}}
    )
    write_text(path, to_commented_yaml(recipe))
    print_done(f"{path} is written. Next: 'lorakeet plan {path}', then 'lorakeet train {path}'.")


def doctor(as_json: Json = False) -> None:
    """Tell what this machine has, what is missing and what that costs."""
    from dataclasses import asdict

    from lorakeet.plan.doctor import check_machine

    findings = check_machine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    rows = [
        (f.name, f.found, "ok" if f.is_ok else "missing", f.advice) for f in findings
    ]  # fmt: skip
    print_table("This machine", ("what", "found", "state", "advice"), rows)


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    settings: Settings = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Make real steps on the longest rows, and compare.")
    ] = False,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="Models of 0.5B to 70B against cards of 8 to 80 GiB.")
    ] = False,
    learning_rate: Annotated[
        bool, typer.Option("--learning-rate", help="Try rates on a copy, and recommend one.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="What an hour of the machine costs.")
    ] = None,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Predict memory, speed and time by method, and say what fits, before anything runs."""
    from lorakeet.api.planning import plan as make
    from lorakeet.api.planning import plan_sizes
    from lorakeet.plan.table import render_plan, render_sizes

    if sum((measure, sizes, learning_rate)) > 1:
        raise RequestError("choose one of --measure, --sizes and --learning-rate at a time.")
    if sizes:
        found = plan_sizes(recipe, overrides=settings or [])
        _show([size.to_dict() for size in found], render_sizes(found), as_json)
    elif learning_rate:
        _try_rates(recipe, settings or [], as_json)
    else:
        made = make(recipe, overrides=settings or [], measure=measure,
                    price_per_hour=price_per_hour)  # fmt: skip
        if measure:
            path = recipe.with_name(f"{recipe.stem}.plan.json")
            write_json(path, made.to_dict())
        _show(made.to_dict(), render_plan(made), as_json)
        if measure and not as_json:
            print_done(f"the plan with its measured figures is in {path}")


def _try_rates(recipe: Path, settings: list[str], as_json: bool) -> None:
    """The sweep, its table and, where matplotlib is there, its picture."""
    from lorakeet.api.rates import try_rates
    from lorakeet.plan.table import render_rates

    picture = recipe.with_name(f"{recipe.stem}.learning-rate.png")
    found = try_rates(recipe, overrides=settings, picture=picture)
    _show(found.to_dict(), render_rates(found), as_json)
    if found.picture and not as_json:
        print_done(f"the picture is {found.picture}")


def _show(content: Any, table: Any, as_json: bool) -> None:
    """One JSON value, or a table for people."""
    if as_json:
        print_json(content)
    else:
        CONSOLE.print(table)
