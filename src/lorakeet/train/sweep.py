"""A few learning rates, each on the same weights, the same rows and for as many steps.

    rate / 3.16, rate, 3.16 rate          (half a power of ten apart)

Every rate begins where the others began and sees the same steps: a fifth of them warm up,
the others keep the rate.  Then the loss on rows that none of them has seen is measured.
When the lowest loss is at an end, the sweep goes on beyond it, at most twice; so the rate
that is recommended has a worse one on each side, or the sweep says that it has not.

A sweep of few steps leans to high rates: the best rate of a short run is above that of a
long one (LoRA Without Regret, 2025: about 1.5 times in runs of under 100 steps).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorakeet.adapters.adalora import build_allocator
from lorakeet.base.errors import BadBatchError, DataError
from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import EncodedSample
from lorakeet.data.order import StepOrder
from lorakeet.data.prepare import PreparedData
from lorakeet.models.fast import fast_units
from lorakeet.models.heap import keep_freed_memory
from lorakeet.train.checkpoint import collect_state, restore_state
from lorakeet.train.fitting import run_within_memory
from lorakeet.train.optimizer import set_rate
from lorakeet.train.sentinels import measure_rows, split_targets
from lorakeet.train.step import build_runner

FACTOR = math.sqrt(10)
WARMUP_FRACTION = 0.2
MIN_STEPS, MAX_STEPS = 8, 30
MAX_TOKENS = 20_000  # of one rate, once MIN_STEPS are made
MAX_HELD_OUT = 32
MAX_EXTENSIONS = 2
MIN_GAIN_FRACTION = 1e-3  # of the first loss; less is rounding and chance


@dataclass(frozen=True, kw_only=True)
class RateResult:
    """What one rate led to.

    Args:
        loss: nats a target on rows that were not trained; None when it was not finite.
    """

    rate: float
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What all rates led to.

    Args:
        results: by rising rate.
        best: the rate with the lowest loss.
        first_loss: before any step.
        is_bracketed: whether rates on both sides of the best were worse.
    """

    results: tuple[RateResult, ...]
    best: float
    first_loss: float
    is_bracketed: bool
    num_steps: int
    num_held_out: int


def sweep_rates(
    model: nn.Module, recipe: Recipe, data: PreparedData, *, pad_id: int, emit: Emit
) -> Sweep:
    """The loss after a few steps at three to five rates around the recipe's.

    Args:
        model: with its method attached; afterwards its weights are those of before.

    Raises:
        DataError: there are too few rows to train on some and measure on others.
        MachineError: one row alone does not fit into memory.
    """
    train = recipe.train
    order = StepOrder.of_recipe(recipe, data.train.source_of)
    steps, held_out = _split(order, data)
    trial = _Trial(model, recipe, order.num_steps, pad_id, emit)
    with keep_freed_memory(), fast_units(model):
        first = trial.measure(held_out)
        found: dict[float, RateResult] = {}
        for rate in (train.learning_rate / FACTOR, train.learning_rate,
                     train.learning_rate * FACTOR):  # fmt: skip
            found[rate] = trial.run(rate, steps, held_out)
        for _ in range(MAX_EXTENSIONS):
            rate = _beyond(found, first)
            if rate is None:
                break
            found[rate] = trial.run(rate, steps, held_out)
    best = min(found, key=lambda rate: (_loss_of(found[rate]), rate))
    return Sweep(
        results=tuple(found[rate] for rate in sorted(found)), best=best, first_loss=first,
        is_bracketed=_beyond(found, first) is None, num_steps=len(steps),
        num_held_out=len(held_out),
    )  # fmt: skip


class _Trial:
    """Runs one rate after another from the same weights."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, num_steps: int, pad_id: int, emit: Emit
    ) -> None:
        self.model, self.recipe, self.num_steps = model, recipe, num_steps
        self.pad_id, self.emit = pad_id, emit
        self.start = collect_state(model)

    def run(
        self, rate: float, steps: Sequence[list[EncodedSample]], held_out: list[EncodedSample]
    ) -> RateResult:
        """The loss on ``held_out`` after training on ``steps``."""
        allocator = build_allocator(self.model, self.num_steps)
        runner = build_runner(self.model, self.recipe, pad_id=self.pad_id, allocator=allocator)
        warmup = max(1, round(WARMUP_FRACTION * len(steps)))
        try:
            self.model.train()
            for number, rows in enumerate(steps, 1):
                set_rate(runner.optimizer, rate * min(1.0, number / warmup))
                seed = (self.recipe.train.seed, number)
                runner, _ = run_within_memory(runner, rows, seed, self.emit)
            loss = self.measure(held_out)
        except BadBatchError:
            loss = math.inf
        finally:
            restore_state(self.model, self.start)
            self.model.eval()
        return RateResult(rate=rate, loss=loss if math.isfinite(loss) else None)

    def measure(self, rows: list[EncodedSample]) -> float:
        """Nats a target over all rows."""
        limit = build_runner(self.model, self.recipe, pad_id=self.pad_id).micro_batch_tokens
        return measure_rows(self.model, rows, pad_id=self.pad_id, max_tokens=limit)


def _split(
    order: StepOrder, data: PreparedData
) -> tuple[list[list[EncodedSample]], list[EncodedSample]]:
    """The rows of the first steps, and rows that these do not hold."""
    places = list(range(min(MAX_HELD_OUT, len(data.validation))))
    held_out, _ = split_targets([data.validation[place] for place in places])
    kept: set[int] = set()
    if not held_out:
        used = order.rows_of_step(1)
        kept = {row for row in range(len(data.train)) if row not in used}
        kept = set(sorted(kept)[-MAX_HELD_OUT:])
        held_out, _ = split_targets([data.train[row] for row in sorted(kept)])
    steps: list[list[EncodedSample]] = []
    num_tokens = 0
    for step in range(1, min(MAX_STEPS, order.num_steps) + 1):
        rows = [data.train[row] for row in order.rows_of_step(step) if row not in kept]
        with_target, _ = split_targets(rows)
        num_tokens += sum(len(row.ids) for row in with_target)
        if len(steps) >= MIN_STEPS and num_tokens > MAX_TOKENS:
            break
        steps += [with_target] if with_target else []
    if not held_out or not steps:
        raise DataError(
            f"{len(data.train)} rows are too few to train on some and to measure on others. Give "
            "data.validation some rows, or add rows."
        )
    return steps, held_out


def _beyond(found: dict[float, RateResult], first_loss: float) -> float | None:
    """The rate to go on with: beyond the best one at an end, or higher where none learned."""
    rates = sorted(found)
    losses = [_loss_of(found[rate]) for rate in rates]
    best = losses.index(min(losses))
    has_learned = losses[best] < (1 - MIN_GAIN_FRACTION) * first_loss
    is_too_high = losses[0] > (1 + MIN_GAIN_FRACTION) * first_loss
    if is_too_high or (has_learned and best == 0):
        return rates[0] / FACTOR
    if not has_learned or best == len(rates) - 1:
        return rates[-1] * FACTOR
    return None


def _loss_of(result: RateResult) -> float:
    return math.inf if result.loss is None else result.loss
