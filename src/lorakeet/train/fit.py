"""A training run from its first step to its end: who stops it, and what is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn

from lorakeet.base.events import Emit
from lorakeet.base.records import Validation
from lorakeet.models.attention_gpu import describe_attention
from lorakeet.models.fast import fast_units
from lorakeet.models.heap import keep_freed_memory
from lorakeet.models.kernels import name_kernels
from lorakeet.train.loop import TrainJob, TrainLoop


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Args:
        steps: the last step that was made.
        stopped_because: a finished sentence.
        tokens_per_s: real tokens over the time inside steps.
    """

    steps: int
    best_step: int
    best_values: dict[str, float]
    stopped_because: str
    tokens_per_s: float
    duration_s: float
    interrupted: bool


def train_model(
    job: TrainJob,
    *,
    emit: Emit,
    validate: Callable[[], Validation],
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Trains until the steps, the patience or the user end it; the best weights stay.

    Args:
        validate: called in evaluation mode without gradients.
        stop_requested: asked after each step; True publishes a checkpoint and stops.

    Raises:
        BadBatchError: a loss, gradient or weight is not finite; nothing of it is kept.
        MachineError: a checkpoint cannot be written.
    """
    with keep_freed_memory(), _tensor_cores(job.model), fast_units(job.model) as units:
        loop = TrainLoop(job, emit, validate)
        emit(
            "path", packing=loop.runner.packs, units=units, saved_fraction=loop.saved_fraction(),
            attention=asdict(describe_attention(job.model)), kernels=name_kernels(job.model),
            device=loop.runner.parameters[0].device.type,
            gradient_checkpointing=loop.settings.gradient_checkpointing,
        )  # fmt: skip
        return _run(loop, stop_requested)


@contextmanager
def _tensor_cores(model: nn.Module) -> Iterator[None]:
    """Inside, float32 matmuls on a GPU round their inputs to TF32, which has its own units."""
    former = torch.get_float32_matmul_precision()
    parameter = max(model.parameters(), key=torch.Tensor.numel)
    if parameter.is_cuda and parameter.dtype == torch.float32:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)


def _run(loop: TrainLoop, stop_requested: Callable[[], bool]) -> TrainResult:
    """Steps and looks until something ends them."""
    started_s = time.perf_counter()
    if loop.job.resume_from is not None:
        loop.restore()
    if loop.step == 0:
        loop.start()
    with loop.writer:
        is_interrupted = _make_steps(loop, stop_requested)
    reason = "Stopped on request." if is_interrupted else "All steps are made."
    if loop.tracker.should_stop and not is_interrupted:
        reason = (
            f"{loop.tracker.metric} has not improved for {loop.tracker.looks_since} looks; the "
            f"best is step {loop.tracker.best_step}."
        )
        loop.emit("early_stop", step=loop.step, reason=reason, best_step=loop.tracker.best_step)
    if not is_interrupted:
        loop.finish()
    return TrainResult(
        steps=loop.step,
        best_step=loop.tracker.best_step,
        best_values=loop.tracker.best_values,
        stopped_because=reason,
        tokens_per_s=loop.num_tokens / max(loop.step_time_s, 1e-9),
        duration_s=time.perf_counter() - started_s,
        interrupted=is_interrupted,
    )


def _make_steps(loop: TrainLoop, stop_requested: Callable[[], bool]) -> bool:
    """Steps, looks and checkpoints; True when the user ended them."""
    while loop.step < loop.order.num_steps and not loop.tracker.should_stop:
        loop.make_step()
        if loop.is_due(loop.look_every):
            loop.look()
        if loop.is_due(loop.settings.checkpoint_every_steps):
            loop.save()
        if stop_requested() and loop.step < loop.order.num_steps:
            if loop.saved_step != loop.step:
                loop.save()
            return True
    return False
