"""``lorakeet plan`` as a user runs it: a fresh process that never needs torch."""

import json
import os
import subprocess
import sys

import pytest

from lorakeet.base.recipe_file import recipe_from_dict, to_commented_yaml

WATCHED = """
import sys
from lorakeet.cli import main
sys.argv = ["lorakeet", *sys.argv[1:]]
try:
    main()
finally:
    print([m for m in ("torch", "transformers") if m in sys.modules], file=sys.stderr)
"""


@pytest.fixture
def run_plan(tmp_path):
    """Runs the command on the starter with these settings."""
    path = tmp_path / "recipe.yaml"
    recipe = recipe_from_dict({"base": "starter", "data": {"train": "rows.jsonl"}})
    path.write_text(to_commented_yaml(recipe))

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", WATCHED, "plan", str(path), *arguments],
            capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"},
        )  # fmt: skip

    return run


def test_the_command_imports_neither_torch_nor_transformers(run_plan):
    done = run_plan("--json")
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (0, "[]")
    content = json.loads(done.stdout)
    assert content["model"]["type"] == "llama"
    assert content["chosen"] == "lora"


def test_the_table_is_printed_at_80_columns(run_plan):
    done = run_plan("--set", "method.targets=[no_such]")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "no_such matches no module" in " ".join(done.stdout.split())
