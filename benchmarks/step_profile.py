"""Where the time of our training step goes: matmul, attention, elementwise, Python."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

SKINNY = 64  # a product with a side of at most so many is one of LoRA's
MATMUL = ("mm", "bmm", "addmm")
ATTENTION = ("_scaled_dot_product",)
COPIES = ("copy_", "clone", "cat", "index", "fill_", "zero_", "select", "gather", "scatter")
NAMES = ("matmul", "LoRA products", "attention", "elementwise", "copies", "Python and other")


def profile_step(train: Callable[[], Any]) -> list[str]:
    """A table of the shares of all steps of a run but the first.

    Args:
        train: makes at least two steps through ``lorakeet.train``.
    """
    from torch.profiler import ProfilerActivity, profile

    from lorakeet.train.step import StepRunner

    run_step, seconds, seen = StepRunner.run, [], []

    def run(runner: StepRunner, *args: Any, **options: Any) -> Any:
        if not seen:  # the first step touches memory for the first time
            seen.append(None)
            return run_step(runner, *args, **options)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            started = time.perf_counter()
            result = run_step(runner, *args, **options)
            seconds.append(time.perf_counter() - started)
        seen.append(profiler.key_averages(group_by_input_shape=True))
        return result

    StepRunner.run = run  # the profiler must see the steps alone, not the loading
    try:
        train()
    finally:
        StepRunner.run = run_step
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for events in seen[1:]:
        for event in events:
            kind = kind_of(event)
            spent[kind] += event.self_cpu_time_total / 1e6
            calls[kind] += event.count
    spent["Python and other"] = sum(seconds) - sum(spent[name] for name in NAMES[:-1])
    return [
        "| part of the step | share | seconds a step | calls a step |",
        "|---|---|---|---|",
        *(f"| {name} | {100 * spent[name] / sum(seconds):.1f} % | {spent[name] / len(seconds):.3f} "
          f"| {calls[name] // len(seconds) or '-'} |" for name in NAMES),
        "",
        f"{len(seconds)} steps of {sum(seconds) / len(seconds):.2f} s under torch.profiler.",
    ]  # fmt: skip


def kind_of(event: Any) -> str:
    """To which part an operation belongs."""
    name = event.key.removeprefix("aten::")
    if name == event.key and not name.startswith("lorakeet::"):
        return "Python and other"  # a function's own time, without the operations inside
    name = name.removeprefix("lorakeet::")
    if name.rstrip("_") in MATMUL:
        sides = [side for shape in event.input_shapes for side in shape[-2:] if len(shape) > 1]
        return "LoRA products" if sides and min(sides) <= SKINNY else "matmul"
    if name.startswith(ATTENTION):
        return "attention"
    return "copies" if name.startswith(COPIES) else "elementwise"
