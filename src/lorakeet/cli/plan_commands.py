"""Before a run: ``lorakeet new``, ``doctor`` and ``plan``; none of them imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakeet.cli.output import CONSOLE, print_done, print_json, print_table

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
    from lorakeet.base.errors import RequestError
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
    as_json: Json = False,
) -> None:
    """Predict memory, speed and time by method, and say what fits, before anything runs."""
    from lorakeet.api.planning import plan as make
    from lorakeet.plan.table import render_plan

    made = make(recipe, overrides=settings or [])
    if as_json:
        print_json(made.to_dict())
        return
    CONSOLE.print(render_plan(made))
