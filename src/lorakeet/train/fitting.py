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
from lorakeet.models.recompute import OFF
from lorakeet.train.step import StepResult, StepRunner


def run_within_memory(
    runner: StepRunner, samples: Sequence[EncodedSample], seed: tuple[int, int], emit: Emit
) -> tuple[StepRunner, StepResult]:
    """A step, replayed with half the micro-batch as often as memory runs out.

    Where nothing can be halved, layers are computed again instead of kept, if the recipe
    leaves that open.

    Returns:
        the runner with what fitted, to go on with, and what the step measured.

    Raises:
        MachineError: one sample alone does not fit.
        BadBatchError: as ``StepRunner.run``.
    """

    def attempt(size: int) -> StepResult:
        return replace(runner, micro_batch_tokens=size).run(samples, seed)

    def next_size(size: int) -> int:
        nonlocal runner
        runner.optimizer.zero_grad(set_to_none=True)
        failed = replace(runner, micro_batch_tokens=size)
        if runner.recompute_next and _is_single(failed, samples):
            runner = _recompute(failed, seed[1], emit)
            return size
        return _halve(failed, samples, seed[1], emit)

    result, size = halve_until_fits(attempt, runner.micro_batch_tokens, next_size)
    return replace(runner, micro_batch_tokens=size), result


def _is_single(runner: StepRunner, samples: Sequence[EncodedSample]) -> bool:
    """Whether no micro-batch of the step can be cut further."""
    return all(len(group) == 1 for group in runner.cut(samples))


def _tell_recompute(runner: StepRunner) -> str:
    """The remedy of a recipe that has switched it off."""
    is_off = runner.recompute == OFF
    return " train.gradient_checkpointing: auto would keep less a layer." if is_off else ""


def _recompute(runner: StepRunner, step: int, emit: Emit) -> StepRunner:
    """The runner that keeps less for its backward pass, and the alarm about it."""
    mode = runner.recompute_next[0]
    emit(
        "alarm", code="out-of-memory", step=step, gradient_checkpointing=mode,
        message="memory ran out with a single sample in the micro-batch. The step is done again "
        f"with train.gradient_checkpointing: {mode}, and so are those after it; gradients stay "
        "the same, a step takes up to half more time.",
    )  # fmt: skip
    return runner.recomputing(mode)


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
            f"free memory and resume.{_tell_recompute(runner)}"
        )
    size = largest // 2
    emit(
        "alarm", code="out-of-memory", step=step, micro_batch_tokens=size, before_tokens=largest,
        message=f"memory ran out with {largest:,} tokens in the micro-batch. The step is done "
        f"again with at most {size:,}; the batch of the step, its tokens and its loss stay the "
        f"same. train.micro_batch_tokens: {size} avoids this at the next run.",
    )  # fmt: skip
    return size
