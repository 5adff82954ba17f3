"""Writes docs/reference from the code: ``python docs/generate_reference.py``.

``tests/contract`` checks that what is committed is what this script writes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
from typer.main import get_command

from lorakeet.base.recipe_file import recipe_from_dict, to_commented_yaml
from lorakeet.cli.app import APP

REFERENCE = Path(__file__).parent / "reference"


def recipe_page() -> str:
    """Every setting with its default and reason."""
    recipe = recipe_from_dict({"base": "starter", "data": {"train": "data.jsonl"}})
    return (
        "# The recipe\n\nEvery setting, its default and the reason; "
        "`lorakeet new` writes the same.\n\n"
        f"```yaml\n{to_commented_yaml(recipe)}```\n"
    )


def list_verbs(command: click.Command, path: str = "") -> list[str]:
    """A command's path and those of all commands below it."""
    below = getattr(command, "commands", {})
    return [path] + [v for name in below for v in list_verbs(below[name], f"{path} {name}")]


def command_page() -> str:
    """The help of every command."""
    pages = []
    for verb in map(str.strip, list_verbs(get_command(APP))):
        done = subprocess.run(
            [sys.executable, "-m", "lorakeet", *verb.split(), "--help"], capture_output=True,
            text=True, check=True,
            env={**os.environ, "COLUMNS": "96", "TERM": "dumb", "NO_COLOR": "1"},
        )  # fmt: skip
        text = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        pages.append(f"## lorakeet {verb}".rstrip() + f"\n\n```\n{text}\n```\n")
    return "# The command line\n\n" + "\n".join(pages)


def pages() -> dict[str, str]:
    """File name -> content."""
    return {"recipe.md": recipe_page(), "commands.md": command_page()}


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
