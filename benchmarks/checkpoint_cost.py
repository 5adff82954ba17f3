"""What a checkpoint costs the training: written in the loop, and written beside it.

    python -m benchmarks.checkpoint_cost [--kind lora] [--saves 8] [--every 5] [--steps-between 50]

Work: the starter model, rows of 128 random tokens, 8 a step.  A save is made every ``--every``
steps, in turn by an arm that waits for the disk and by one that hands a copy over.  ``blocked``
is the time that the loop stands still for a save; ``slower`` is what the steps beside a write
take longer than the steps without one, as writer and steps share the processor.  The share is
(blocked + slower) over the time of ``--steps-between`` steps (50 is the recipe's default).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.records import EncodedSample, Origin, Validation
from lorakeet.base.run_folder import RunFolder, write_text
from lorakeet.data.prepare import PreparedData
from lorakeet.data.shards import ShardReader, write_shards
from lorakeet.models.fast import fast_units
from lorakeet.models.load import load_model
from lorakeet.models.methods import apply_method
from lorakeet.train.checkpoint import collect_moments, collect_state
from lorakeet.train.loop import TrainJob, TrainLoop

RESULTS = Path(__file__).parent / "results" / "checkpoint_cost.md"
TOKENS, ROWS_PER_STEP = 128, 8
ARMS = ("in the loop", "beside it")


def build_loop(folder: Path, kind: str, steps: int) -> TrainLoop:
    """A loop over random rows that never validates and never saves by itself."""
    draw = np.random.default_rng(0)
    rows = [
        EncodedSample(ids=draw.integers(3, 2000, TOKENS).astype(np.int32),
                      mask=np.arange(TOKENS) > 0, origin=Origin(path="random", line=line + 1))
        for line in range(64)
    ]  # fmt: skip
    write_shards(((row, 0) for row in rows), folder / "train")
    write_shards(iter(()), folder / "validation")
    data = PreparedData(train=ShardReader(folder / "train"), label_names=(), report={},
                        validation=ShardReader(folder / "validation"))  # fmt: skip
    recipe = recipe_from_dict({
        "base": "starter", "data": {"train": "random"}, "method": {"kind": kind},
        "train": {"batch_size": ROWS_PER_STEP, "max_steps": steps, "epochs": 10**6},
    })  # fmt: skip
    model, _ = load_model("starter")
    apply_method(model, recipe.method, task="chat", seed=0)
    job = TrainJob(model=model, recipe=recipe, data=data, run=RunFolder(folder), pad_id=0)
    return TrainLoop(job, lambda kind, /, **_: None, lambda: Validation(values={}))


def measure(kind: str, saves: int, every: int) -> dict[str, Any]:
    """Seconds of steps and saves; the arms take turns."""
    plain: list[float] = []
    blocked: dict[str, list[float]] = {arm: [] for arm in ARMS}
    beside: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as place:
        loop = build_loop(Path(place), kind, 2 * saves * every + every)
        with fast_units(loop.job.model), loop.writer:
            for _ in range(every):
                timed(loop.make_step)
            for number in range(2 * saves):
                arm = ARMS[number % 2]
                plain += [timed(loop.make_step) for _ in range(every - 1)]
                blocked[arm].append(timed(lambda a=arm: save(loop, a)))
                beside[arm].append(timed(loop.make_step))
                loop.writer.tell(max_held=0)
        state = (collect_state(loop.job.model), collect_moments(loop.job.model,
                                                                loop.runner.optimizer))  # fmt: skip
    num_bytes = sum(t.numel() * t.element_size() for group in state for t in group.values())
    step_s = statistics.median(plain)
    return {
        "kind": kind, "bytes": num_bytes, "step_s": step_s,
        "blocked_s": {arm: statistics.median(times) for arm, times in blocked.items()},
        "slower_s": {arm: max(0.0, statistics.median(t) - step_s) for arm, t in beside.items()},
    }  # fmt: skip


def save(loop: TrainLoop, arm: str) -> None:
    """A checkpoint; the first arm waits until it is published."""
    loop.save()
    if arm == ARMS[0]:
        loop.writer.tell(max_held=0)


def timed(work: Any) -> float:
    """Seconds of a call."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def to_table(found: list[dict[str, Any]], steps_between: int) -> str:
    """A row for each method and arm."""
    lines = [
        f"One checkpoint each {steps_between} steps; {torch.get_num_threads()} threads.", "",
        "| method | state | step | written | blocked | slower | share of step time |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found:
        for arm in ARMS:
            cost_s = row["blocked_s"][arm] + row["slower_s"][arm]
            share = cost_s / (steps_between * row["step_s"])
            lines.append(
                f"| {row['kind']} | {row['bytes'] / 2**20:.1f} MiB | {1e3 * row['step_s']:.0f} ms "
                f"| {arm} | {1e3 * row['blocked_s'][arm]:.1f} ms "
                f"| {1e3 * row['slower_s'][arm]:.1f} ms | {100 * share:.2f} % |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", action="append", choices=("lora", "full"))
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--steps-between", type=int, default=50)
    parser.add_argument("--write", action="store_true", help="keep the table in results/")
    asked = parser.parse_args()
    kinds = asked.kind or ["lora", "full"]
    table = to_table([measure(k, asked.saves, asked.every) for k in kinds], asked.steps_between)
    print(table)
    if asked.write:
        write_text(RESULTS, "# What a checkpoint costs\n\n" + table)


if __name__ == "__main__":
    main()
