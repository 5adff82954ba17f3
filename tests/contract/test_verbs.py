"""``lk.train`` and its like stay verbs when the floors of the same name are imported."""

import inspect
import subprocess
import sys

import pytest

import lorakeet as lk


@pytest.mark.parametrize("verb", ["train", "plan", "serve", "evaluate"])
def test_a_verb_can_be_called_before_and_after_its_floor_is_imported(verb):
    code = (
        f"import lorakeet as lk; first = lk.{verb}; import lorakeet.{verb}; "
        f"again = lk.{verb}; from lorakeet import {verb}\n"
        f"for call in (first, again, {verb}):\n"
        "    try: call()\n"
        "    except TypeError as error: assert 'missing' in str(error), error\n"
        "    else: raise SystemExit('no arguments were asked for')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    for name in lk.__all__:
        assert getattr(lk, name) is not None
    assert callable(lk.plan) and inspect.isfunction(lk.resume)
