"""The acts of a training run: a step, a look at the validation data, a checkpoint.

Who watches and who validates are arguments, so this floor knows neither the
console nor the evaluation.  Rows, rates and dropout follow from (seed, step)
alone; with the tensors of a checkpoint that makes a resumed run bit-identical.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakeet.adapters.adalora import build_allocator
from lorakeet.base.errors import BadBatchError
from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import EncodedSample, StepReport, Validation
from lorakeet.base.run_folder import RunFolder
from lorakeet.data.order import StepOrder
from lorakeet.data.prefixes import measure_saved_fraction
from lorakeet.data.prepare import PreparedData
from lorakeet.models.out_of_memory import halve_until_fits
from lorakeet.train.checkpoint import (
    Checkpoint,
    collect_moments,
    collect_state,
    read_newest_checkpoint,
    restore_moments,
    restore_state,
)
from lorakeet.train.checkpoint_writer import CheckpointWriter
from lorakeet.train.fitting import halve_batch, run_within_memory
from lorakeet.train.frozen_choice import keep_frozen
from lorakeet.train.optimizer import set_rate
from lorakeet.train.schedule import rate_at
from lorakeet.train.sentinels import (
    count_zero_factors,
    measure_first_batch,
    split_targets,
    to_no_target_error,
)
from lorakeet.train.step import StepResult, build_runner
from lorakeet.train.stopping import BestTracker

LOOKS_PER_RUN = 10
RECENT_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What is trained, on what, and where.

    Args:
        resume_from: the folder of checkpoints to go on from, or None for a new run.
    """

    model: nn.Module
    recipe: Recipe
    data: PreparedData
    run: RunFolder
    pad_id: int
    resume_from: Path | None = None


class TrainLoop:
    """A run in progress; ``train.fit`` is its one user."""

    def __init__(self, job: TrainJob, emit: Emit, validate: Callable[[], Validation]) -> None:
        settings = job.recipe.train
        self.job, self.emit, self.validate = job, emit, validate
        self.settings = settings
        self.order = StepOrder.of_recipe(job.recipe, job.data.train.source_of)
        self.allocator = build_allocator(job.model, self.order.num_steps)
        self.runner = build_runner(
            job.model, job.recipe, pad_id=job.pad_id, allocator=self.allocator
        )
        self.runner = keep_frozen(
            self.runner, job.recipe, job.data.train, job.run.frozen_states,
            saved_fraction=self.saved_fraction(), emit=emit,
        )  # fmt: skip
        self.tracker = BestTracker.build(
            settings.early_stopping, is_classifier=job.recipe.task == "classify"
        )
        auto = max(1, -(-self.order.num_steps // LOOKS_PER_RUN))
        every = settings.evaluate_every_steps
        self.look_every = auto if every == "auto" else every
        self.best: dict[str, Tensor] = {}
        self.step, self.saved_step, self.bad_in_a_row = 0, 0, 0
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.num_tokens = 0
        self.step_time_s = 0.0
        self.writer = CheckpointWriter(job.run.checkpoints, emit)

    def restore(self) -> None:
        """Takes up the newest good checkpoint; with none the run starts anew."""
        state = read_newest_checkpoint(self.job.resume_from, self.emit)
        if state is None:
            message = f"{self.job.resume_from}: no whole checkpoint is there. Starting at step 0."
            self.emit("alarm", code="no-checkpoint", step=0, message=message)
            return
        restore_state(self.job.model, state.trained)
        restore_moments(self.job.model, self.runner.optimizer, state.moments)
        if self.allocator:
            self.allocator.restore(state.moments)
        self.best = dict(state.best)
        self.step = self.saved_step = state.step
        self.bad_in_a_row = state.progress.get("bad_in_a_row", 0)
        self.tracker.restore(state.progress)
        self.recent.extend(state.progress["recent_losses"])
        self.num_tokens = state.progress["num_tokens"]
        self.step_time_s = state.progress["step_time_s"]
        fitted = state.progress.get("micro_batch_tokens", self.runner.micro_batch_tokens)
        kept = state.progress.get("gradient_checkpointing", self.runner.recompute)
        self.runner = replace(self.runner.recomputing(kept), micro_batch_tokens=fitted)

    def save(self) -> None:
        """Hands a copy of this moment over to be written and published."""
        progress = {
            **self.tracker.to_progress(),
            "bad_in_a_row": self.bad_in_a_row,
            "recent_losses": list(self.recent),
            "num_tokens": self.num_tokens,
            "step_time_s": self.step_time_s,
            "micro_batch_tokens": self.runner.micro_batch_tokens,
            "gradient_checkpointing": self.runner.recompute,
        }
        ranks = self.allocator.to_tensors() if self.allocator else {}  # replaced, never changed
        self.writer.hand_over(
            Checkpoint(
                step=self.step,
                trained=collect_state(self.job.model),
                moments=collect_moments(self.job.model, self.runner.optimizer) | ranks,
                best=self.best,
                progress=progress,
            )
        )
        self.saved_step = self.step

    def start(self) -> None:
        """Before the first step: the tuned model must answer like its base, if it is new."""
        rows, _ = split_targets(self._rows_of(1))
        if rows:
            job, method = self.job, self.job.recipe.method
            # A parent's adapter has learned, and LoftQ's repairs its base: they are not empty.
            is_empty = method.adapter is None and method.start != "loftq"
            seen, _ = halve_until_fits(
                lambda size: measure_first_batch(
                    job.model, rows, pad_id=job.pad_id, max_tokens=size
                ),
                self.runner.micro_batch_tokens, halve_batch,
            )  # fmt: skip
            self.emit("first_batch", step=0, starts_at_base=is_empty, **seen)
        self.look()

    def make_step(self) -> None:
        """One optimiser step and its event; a bad batch is passed over or ends the run.

        Raises:
            BadBatchError: more bad batches in a row than the recipe allows; the last good
                state is saved.
            MachineError: not even one sample fits into memory.
        """
        self.step += 1
        rate = rate_at(self.step, self.order.num_steps, self.settings)
        set_rate(self.runner.optimizer, rate)
        rows, without_target = split_targets(self._rows_of(self.step))
        self.job.model.train()
        try:
            if without_target:
                error = to_no_target_error(self.step, without_target)
                self.emit("alarm", code="no-target", step=self.step, rows=list(error.rows),
                          message=str(error))  # fmt: skip
                if not rows:
                    raise error
            self.runner, result = run_within_memory(
                self.runner, rows, (self.settings.seed, self.step), self.emit
            )
        except BadBatchError as error:
            self._pass_over(error)
            return
        self.bad_in_a_row = 0
        self.recent.append(result.loss)
        self.num_tokens += result.num_tokens
        self.step_time_s += result.duration_s
        self._report(result, rate)
        self.writer.tell()

    def _rows_of(self, step: int) -> list[EncodedSample]:
        return [self.job.data.train[row] for row in self.order.rows_of_step(step)]

    def _pass_over(self, error: BadBatchError) -> None:
        """Goes on without the batch, or saves the last good state and raises."""
        self.bad_in_a_row += 1
        allowed = self.settings.skip_bad_batches
        is_over = error.is_in_weights or self.bad_in_a_row > allowed
        end = "The run stops." if is_over else f"It is skipped; {allowed} in a row may be."
        self.emit("alarm", code="bad-batch", step=self.step, rows=list(error.rows),
                  is_skipped=not is_over, message=f"{error} {end}")  # fmt: skip
        if is_over:
            self.step -= self.bad_in_a_row
            self.bad_in_a_row = 0
            if not error.is_in_weights and self.step > self.saved_step:
                self.save()
            raise error

    def look(self) -> None:
        """Validates, remembers the best weights, and tells what was seen."""
        self.job.model.eval()
        if self.step and (factors := count_zero_factors(self.job.model))["num_factors"]:
            self.emit("factors", step=self.step, **factors)
        with torch.no_grad():
            seen = self.validate()
        if seen.values:
            train_loss = sum(self.recent) / len(self.recent) if self.recent else None
            self.emit("evaluation", step=self.step, values=seen.values, train_loss=train_loss)
        if seen.answers:
            self.emit("sample_answers", step=self.step, answers=seen.answers)
        if self.allocator and not self.allocator.is_settled(self.step):
            return  # weights with more ranks than were asked for are no candidates
        if self.tracker.observe(self.step, seen.values):
            self.best = collect_state(self.job.model)

    def saved_fraction(self) -> float:
        """The share of tokens that the model need not compute, as samples share openings."""
        runner = self.runner
        if not runner.shares:
            return 0.0
        return measure_saved_fraction(self.job.data.train, self.order, runner.micro_batch_tokens)

    def is_due(self, every: int) -> bool:
        """Whether a periodic act falls on this step; the last step always counts."""
        return self.step % every == 0 or self.step == self.order.num_steps

    def finish(self) -> None:
        """Leaves the best weights in the model, when a validation has chosen any."""
        if self.best and self.tracker.best_step != self.step:
            restore_state(self.job.model, self.best)
        self.job.model.eval()
        if self.runner.frozen is not None:
            frozen = self.runner.frozen
            self.emit("frozen_states", num_taken=frozen.num_taken, num_bytes=frozen.remove())
        if self.allocator:
            self.emit("ranks", step=self.step, ranks=self.allocator.ranks())

    def _report(self, result: StepResult, rate: float) -> None:
        report = StepReport(
            step=self.step, epoch=self.order.epoch_at(self.step), loss=result.loss,
            num_targets=result.num_targets, num_tokens=result.num_tokens, learning_rate=rate,
            gradient_norm=result.gradient_norm, duration_s=result.duration_s,
        )  # fmt: skip
        tokens_per_s = result.num_tokens / max(result.duration_s, 1e-9)
        self.emit(
            "step", **asdict(report), tokens_per_s=tokens_per_s, num_steps=self.order.num_steps
        )
