"""The same faults for Lorakeet and for Trainer + PEFT, in the same run, on the same machine.

    python -m benchmarks.faults [--kills 6] [--nans 9] [--adapters 20] [--write]

kills      a run of 6 steps that saves after each is killed (SIGKILL) one to three times at random
           moments, resumed from what lies on the disk, and must end with the undisturbed bytes
NaN        one number of the loss, a gradient or a weight becomes NaN at one step; it must be
           caught in that step, and nothing that is not finite may lie on the disk
adapters   damaged adapter folders (``tests/adapters/test_mutations.py``) must be refused

Both train LoRA r = 2 on the same tiny Llama with random weights and the same tokens; each is
killed at the same shares of its own duration.  The seeds are fixed, the moments follow from them
and from this machine's speed.  Every attempt is a forked child, so it costs no imports.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.adapters.test_mutations import KINDS, OTHER_BASE, SETTINGS
from tests.families import build
from tests.killed_runs import BAD, GOOD, STEPS, STUCK, KillTrials, in_child, wait_for, write_work

from benchmarks.fault_arms import CaughtError, Lorakeet, TrainerAndPeft
from lorakeet.base.run_folder import write_text

RESULTS = Path(__file__).parent / "results" / "faults.md"
WHERE = ("loss", "gradient", "weight")
CAUGHT, CLEAN, TOLD = "caught in its step", "nothing on the disk but finite numbers", 3


def count_kills(arm: Any, folder: Path, trials: int) -> Counter[str]:
    """How many runs ended with the undisturbed bytes, with others, or not at all."""
    bench = KillTrials(folder, arm.train, arm.result_of)
    found: Counter[str] = Counter()
    for trial in range(trials):
        run = folder / f"kill-{trial}"
        found[bench.run_trial(trial, run)] += 1
        shutil.rmtree(run, ignore_errors=True)
    return found


def count_nans(arm: Any, folder: Path, trials: int) -> Counter[str]:
    """How many faults were caught in their step, and after how many the disk is clean."""
    found: Counter[str] = Counter()
    for trial in range(trials):
        draw, run = random.Random(trial), folder / f"nan-{trial}"
        where, at = WHERE[trial % 3], draw.randint(2, STEPS - 1)
        code = wait_for(in_child(lambda r=run, w=where, n=at: try_spoiled(arm, r, w, n)))
        found[CAUGHT] += code == TOLD
        found[CLEAN] += all(map(is_finite, run.rglob("*.safetensors")))
        shutil.rmtree(run, ignore_errors=True)
    return found


def try_spoiled(arm: Any, run: Path, where: str, at: int) -> int:
    """TOLD when the trainer noticed the fault in its own step, else 0 or an error."""
    try:
        arm.train_spoiled(run, where, at)
    except CaughtError:
        return TOLD
    return 0


def is_finite(path: Path) -> bool:
    """Whether every number of a file is one."""
    return all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


def count_refused(arm: Any, folder: Path, trials: int) -> int:
    """How many damaged adapters were refused with an error."""
    from lorakeet.adapters.attach import adapter_parameters, attach
    from lorakeet.adapters.files import write_adapter

    refused = 0
    for trial in range(trials):
        kind, number = KINDS[trial % len(KINDS)], trial // len(KINDS)
        draw, place = random.Random(f"{kind.__name__}-{number}"), folder / f"adapter-{trial}"
        family, settings = SETTINGS[number % len(SETTINGS)]
        source = build(family)
        attach(source, settings)
        with torch.no_grad():
            for parameter in adapter_parameters(source).values():
                parameter.add_(0.1)
        write_adapter(source, place, base="none")
        kind(place, draw)
        model = build(OTHER_BASE[family] if kind.__name__ == "wrong_base" else family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                arm.read_adapter(model, place)
            except Exception:  # noqa: BLE001 - any error is a refusal
                refused += 1
        shutil.rmtree(place)
    return refused


def to_table(asked: argparse.Namespace, found: dict[str, dict[str, str]]) -> str:
    """Each test a row, each trainer a column."""
    arms = list(found)
    rows = list(found[arms[0]])
    lines = [f"| | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(found[arm][row] for arm in arms)} |" for row in rows]
    names = ("lorakeet", "torch", "transformers", "peft", "accelerate")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    lines += ["", f"One run of `python -m benchmarks.faults --kills {asked.kills} --nans "
              f"{asked.nans} --adapters {asked.adapters}`; {versions}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def measure(arm: Any, folder: Path, asked: argparse.Namespace) -> dict[str, str]:
    """All figures of one arm."""
    kills = count_kills(arm, folder, asked.kills)
    nans = count_nans(arm, folder, asked.nans)
    refused = count_refused(arm, folder, asked.adapters)
    return {
        "killed 1 to 3 times, resumed, ended with the same bytes": f"{kills[GOOD]}/{asked.kills}",
        "killed: resumed, ended with other bytes": f"{kills[BAD]}/{asked.kills}",
        "killed: could not be resumed": f"{kills[STUCK]}/{asked.kills}",
        "NaN in loss, gradient or weight caught in its step": f"{nans[CAUGHT]}/{asked.nans}",
        "NaN: only finite numbers on the disk afterwards": f"{nans[CLEAN]}/{asked.nans}",
        "damaged adapters refused": f"{refused}/{asked.adapters}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--nans", type=int, default=9)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="keep the table in results/")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        write_work(work)
        found = {}
        for number, arm in enumerate((Lorakeet(work), TrainerAndPeft(work))):
            found[arm.name] = measure(arm, work / f"arm-{number}", asked)
            print(json.dumps({arm.name: found[arm.name]}, indent=1), flush=True)
    table = to_table(asked, found)
    print(table)
    if asked.write:
        write_text(RESULTS, "# The same faults for Lorakeet and for Trainer + PEFT\n\n" + table)


if __name__ == "__main__":
    main()
