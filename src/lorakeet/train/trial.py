"""A few real steps before a run, for their memory and their speed.

The longest rows are put into one step, so no step of the run holds more; the moments exist
from the first step on, so the second one, made beside the copies of a checkpoint, is as large as
any later one.  Then steps of the run follow for the rate, where it is asked for.  Nothing is kept.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakeet.adapters.adalora import build_allocator
from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import EncodedSample
from lorakeet.data.order import StepOrder
from lorakeet.data.prepare import PreparedData
from lorakeet.models.fast import fast_units
from lorakeet.models.heap import keep_freed_memory
from lorakeet.train.checkpoint import collect_moments, collect_state
from lorakeet.train.fitting import run_within_memory
from lorakeet.train.memory import peak_bytes
from lorakeet.train.sentinels import split_targets
from lorakeet.train.step import StepRunner, build_runner

NUM_MICRO_BATCHES = 2  # the second one meets the gradients of the first
MAX_RATE_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a few steps took.

    Args:
        peak_bytes: of the process or the GPU; None where the system does not tell.
        longest_tokens: of the largest micro-batch.
        micro_batch_tokens: the limit that fitted; below the recipe's where memory ran out.
        tokens_per_s: of real steps, after the first one.
    """

    peak_bytes: int | None
    longest_tokens: int
    micro_batch_tokens: int
    tokens_per_s: float
    num_steps: int


def try_steps(
    model: nn.Module, recipe: Recipe, data: PreparedData, *, pad_id: int, emit: Emit,
    rate_s: float = 0.0,
) -> Trial:  # fmt: skip
    """Steps of a recipe on its longest rows, then on its first ones.

    Args:
        model: with its method attached; trained for a few steps.
        rate_s: the run's own steps are timed until this has passed; 0 times the second of the
            longest instead.

    Raises:
        MachineError: not even the longest row fits.
    """
    settings = recipe.train
    order = StepOrder.of_recipe(recipe, data.train.source_of)
    with keep_freed_memory(), fast_units(model):
        allocator = build_allocator(model, order.num_steps)
        runner = build_runner(model, recipe, pad_id=pad_id, allocator=allocator)
        model.train()
        rows = choose_longest(data.train, runner, settings.batch_size)
        copies: list[Any] = [collect_state(model)]  # a run keeps the best weights
        runner, _ = run_within_memory(runner, rows, (settings.seed, 1), emit)
        # A run goes on while the state after a step is written.
        copies += [collect_state(model), collect_moments(model, runner.optimizer)]
        runner, result = run_within_memory(runner, rows, (settings.seed, 2), emit)
        peak = peak_bytes()
        copies.clear()
        timed = [] if rate_s else [(result.num_tokens, result.duration_s)]
        started_s = time.perf_counter()
        while not timed or (
            time.perf_counter() - started_s < rate_s and len(timed) < MAX_RATE_STEPS
        ):
            step = len(timed) % order.num_steps + 1
            some, _ = split_targets([data.train[row] for row in order.rows_of_step(step)])
            runner, result = run_within_memory(runner, some, (settings.seed, step), emit)
            timed.append((result.num_tokens, result.duration_s))
    tokens, seconds = (sum(column) for column in zip(*timed, strict=True))
    lengths = [len(row.ids) for row in rows]
    return Trial(
        peak_bytes=peak, micro_batch_tokens=runner.micro_batch_tokens,
        longest_tokens=max(sum(lengths[i] for i in group) for group in runner.cut(rows)),
        tokens_per_s=tokens / max(seconds, 1e-9), num_steps=len(timed),
    )  # fmt: skip


def choose_longest(reader: Any, runner: StepRunner, batch_size: int) -> list[EncodedSample]:
    """The longest rows, as many as fill two micro-batches and no more than a step holds."""
    lengths = reader.lengths
    ordered = sorted(range(len(lengths)), key=lambda row: (-int(lengths[row]), row))
    chosen: list[EncodedSample] = []
    for row in ordered[:batch_size]:
        chosen.append(reader[row])
        if len(runner.cut(chosen)) > NUM_MICRO_BATCHES:
            return chosen[:-1]
    return chosen
