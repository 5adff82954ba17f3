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


def test_help_needs_no_library_but_that_of_the_command_line():
    code = (
        "import sys, runpy\ntry:\n    runpy.run_module('lorakeet', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'ruamel') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert "Usage" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_the_table_is_printed_at_80_columns(run_plan):
    done = run_plan("--set", "method.targets=[no_such]")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "no_such matches no module" in " ".join(done.stdout.split())


def test_sizes_and_prices_are_told_without_torch_at_80_columns(run_plan):
    done = run_plan("--sizes")
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (0, "[]")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert all(word in done.stdout for word in ("0.5B", "70B", "24 GiB", "qlora"))
    done = run_plan("--price-per-hour", "2", "--json")
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (0, "[]")
    lora = next(m for m in json.loads(done.stdout)["methods"] if m["kind"] == "lora")
    if lora["tokens_per_s"]:
        expected = 1e6 / lora["tokens_per_s"] / 3600 * 2
        assert lora["cost_per_million_tokens"] == pytest.approx(expected)


def test_two_kinds_of_plan_at_a_time_are_refused(run_plan):
    done = run_plan("--sizes", "--measure")
    assert done.returncode == 2 and "one of --measure" in done.stderr
