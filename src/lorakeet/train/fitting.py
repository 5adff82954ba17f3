"""An optimiser step that fits: when memory runs out, the same step in smaller micro-batches.

    g = (1 / n) sum over micro-batches of d loss_sum / d theta

n belongs to the step and not to a micro-batch, so a step of twice as many micro-batches of
half the size has the same tokens, the same loss and the same gradient.  Only dropout, which
draws a mask a micro-batch, draws others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorakeet.base.errors import MachineError
from lorakeet.base.events import Emit
from lorakeet.base.records import EncodedSample
from lorakeet.models.out_of_memory import halve_until_fits
from lorakeet.train.step import StepResult, StepRunner


def run_within_memory(
    runner: StepRunner, samples: Sequence[EncodedSample], seed: tuple[int, int], emit: Emit
) -> tuple[StepRunner, StepResult]:
    """A step, replayed with half the micro-batch as often as memory runs out.

    Returns:
        the runner with the size that fitted, to go on with, and what the step measured.

    Raises:
        MachineError: one sample alone does not fit.
        BadBatchError: as ``StepRunner.run``.
    """

    def next_size(size: int) -> int:
        runner.optimizer.zero_grad(set_to_none=True)
        return _halve(replace(runner, micro_batch_tokens=size), samples, seed[1], emit)

    result, size = halve_until_fits(
        lambda size: replace(runner, micro_batch_tokens=size).run(samples, seed),
        runner.micro_batch_tokens, next_size,
    )  # fmt: skip
    return replace(runner, micro_batch_tokens=size), result


def halve_batch(size: int) -> int:
    """Half of a size for a look without training.

    Raises:
        MachineError: one row alone does not fit.
    """
    if size <= 1:
        raise MachineError(
            "memory ran out while one row passed the model without training. Lower "
            "data.max_tokens, choose a smaller base, or free memory."
        )
    return size // 2


def _halve(runner: StepRunner, samples: Sequence[EncodedSample], step: int, emit: Emit) -> int:
    """Half of the largest micro-batch that the step had, and the alarm about it."""
    lengths = [len(sample.ids) for sample in samples]
    groups = runner.cut(samples)
    largest = max(sum(lengths[place] for place in group) for group in groups)
    largest = min(
        largest, max(runner.micro_batch_tokens, max(lengths))
    )  # a shared part counts once
    longest = max(lengths)
    if all(len(group) == 1 for group in groups):
        raise MachineError(
            f"step {step}: memory ran out with a single sample of {longest:,} tokens in the "
            "micro-batch, so it cannot be cut further. The optimiser did not step. Lower "
            f"data.max_tokens below {longest:,}, lower method.rank, choose a smaller base, or "
            "free memory and resume."
        )
    size = largest // 2
    emit(
        "alarm", code="out-of-memory", step=step, micro_batch_tokens=size, before_tokens=largest,
        message=f"memory ran out with {largest:,} tokens in the micro-batch. The step is done "
        f"again with at most {size:,}; the batch of the step, its tokens and its loss stay the "
        f"same. train.micro_batch_tokens: {size} avoids this at the next run.",
    )  # fmt: skip
    return size
