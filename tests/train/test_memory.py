"""The peak of a process is its own, whatever the process that started it holds."""

import subprocess
import sys

import torch

from lorakeet.base.units import MIB
from lorakeet.train.memory import peak_bytes


def test_a_childs_peak_is_its_own():
    held = torch.ones(700 * MIB // 4)
    code = "from lorakeet.train.memory import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_bytes() > held.nbytes > int(done.stdout)


def test_the_peak_grows_with_what_is_held():
    before = peak_bytes()
    held = torch.ones((before + 200 * MIB) // 4)
    assert peak_bytes() >= max(before, held.nbytes)
