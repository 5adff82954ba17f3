"""What the step benchmarks have in common: our arm, the peers' clock, and taking turns."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, float]


def run_ours(recipe: dict[str, Any], work: Path, *, warm_steps: int = 1) -> Figures:
    """``lorakeet.train`` as a user would run it: real tokens and seconds after the warm steps."""
    import lorakeet as lk
    from lorakeet.base.events import read_events

    folder = work / f"run-{time.time_ns()}"
    lk.train(recipe, folder)
    steps = [e for e in read_events(folder / "events.jsonl") if e["kind"] == "step"][warm_steps:]
    return {"tokens": sum(e["num_tokens"] for e in steps),
            "seconds": sum(e["duration_s"] for e in steps)}  # fmt: skip


def run_timed(
    trainer: Any, *, warm_steps: int = 1, wait: Callable[[], None] = lambda: None
) -> Figures:
    """A Trainer's training: real tokens and seconds after the warm steps.

    Tokens are counted where the loader asks for a batch.  It asks one ahead, so the tokens of
    the timed steps are those between two marks.

    Args:
        wait: for the device, before the clock is read.
    """
    from transformers import TrainerCallback

    seen: list[int] = []
    marks: list[tuple[float, int]] = []
    collate = trainer.data_collator

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            wait()
            marks.append((time.perf_counter(), sum(seen)))

    def count(features: list[Any]) -> Any:
        seen.append(sum(len(feature["input_ids"]) for feature in features))
        return collate(features)

    trainer.data_collator = count
    trainer.add_callback(Clock())
    trainer.train()
    first, last = marks[warm_steps - 1], marks[-1]
    return {"tokens": last[1] - first[1], "seconds": last[0] - first[0]}


def take_turns(
    module: str, arms: list[str], work: Path, asked: argparse.Namespace
) -> dict[str, list[Figures]]:
    """Each arm in a process of its own, one after the other, ``asked.repeats`` times.

    Args:
        module: takes ``--arm``, ``--work`` and ``--steps``, and ends with a line of JSON.
    """
    found: dict[str, list[Figures]] = {arm: [] for arm in arms}
    for _ in range(asked.repeats):
        for arm in arms:
            command = [sys.executable, "-m", module, "--arm", arm, "--work", str(work),
                       "--steps", str(asked.steps)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode < 0:
                raise SystemExit(f"{arm}: ended by the system (signal {-done.returncode}), most "
                                 "often for a lack of memory. Leave it out of --arms.")  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{arm}: {done.stderr[-2000:]}")
            found[arm].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(arm, found[arm][-1], flush=True)
    return found
