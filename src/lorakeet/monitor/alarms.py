"""Alarms: what looks wrong in the stream of events, in plain words with a remedy.

    overfit    validation loss >= 1.3 x training loss, and rising above its best
    spike      loss > 3 x the median of the last 20 steps
    stuck      the gradient is exactly zero, so nothing is learned
    zero       the loss is exactly zero
    plateau    the median loss of the last 60 steps is not below that of the 60 before
    repeating  a sample answer says one thing over and over, or nothing

Each alarm sounds once per episode: it must go away before it can sound again.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

from lorakeet.base.events import Emit

OVERFIT_RATIO = 1.3
SPIKE_RATIO = 3.0
SPIKE_WINDOW_STEPS = 20
PLATEAU_STEPS = 60
PLATEAU_GAIN_FRACTION = 0.005
REPEATS = 4


class AlarmWatch:
    """A sink that hears steps, evaluations and sample answers, and emits alarms.

    Args:
        emit: told of each alarm as ``emit("alarm", code=, message=, step=)``.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._losses: deque[float] = deque(maxlen=2 * PLATEAU_STEPS)
        self._best_validation = float("inf")
        self._sounding: set[str] = set()

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Hears one event."""
        if kind == "step":
            self._hear_step(fields)
        elif kind == "evaluation":
            self._hear_evaluation(fields)
        elif kind == "sample_answers":
            self._hear_answers(fields)

    def _hear_step(self, fields: dict[str, Any]) -> None:
        step, loss = fields["step"], fields["loss"]
        recent = list(self._losses)[-SPIKE_WINDOW_STEPS:]
        usual = median(recent) if len(recent) == SPIKE_WINDOW_STEPS else None
        self._set("spike", usual is not None and loss > SPIKE_RATIO * usual, step,
                  f"the loss is {loss:.3g}, and was {usual or 0:.3g} before. Often one odd batch, "
                  "or a learning rate that is too high: lower train.learning_rate.")  # fmt: skip
        self._set("stuck", fields["gradient_norm"] == 0, step,
                  "the gradient is exactly zero, so nothing is learned. No trained parameter "
                  "reaches the loss: check method.targets.")  # fmt: skip
        self._set("zero", loss == 0, step,
                  "the loss is exactly zero. Either the samples are known by heart or hardly any "
                  "token is trained: look at them with 'lorakeet data show'.")  # fmt: skip
        self._losses.append(loss)
        self._watch_plateau(step)

    def _watch_plateau(self, step: int) -> None:
        losses = list(self._losses)
        if len(losses) < 2 * PLATEAU_STEPS:
            return
        older, newer = median(losses[:PLATEAU_STEPS]), median(losses[PLATEAU_STEPS:])
        is_flat = newer > (1 - PLATEAU_GAIN_FRACTION) * older and newer > 0.05
        self._set("plateau", is_flat, step,
                  f"the loss has stayed near {newer:.3g} for {2 * PLATEAU_STEPS} steps. Either the "
                  "model has learned what it can, or the rate is too low.")  # fmt: skip

    def _hear_evaluation(self, fields: dict[str, Any]) -> None:
        seen, trained = fields["values"].get("loss"), fields.get("train_loss")
        if seen is None or not trained:
            return
        is_overfit = seen >= OVERFIT_RATIO * trained and seen > self._best_validation
        self._best_validation = min(self._best_validation, seen)
        self._set("overfit", is_overfit, fields["step"],
                  f"the validation loss ({seen:.3g}) is {seen / trained:.1f} x the training loss "
                  f"({trained:.3g}) and rising. The model learns the rows by heart: fewer epochs, "
                  "more data, or a smaller rank. The best weights are kept.")  # fmt: skip

    def _hear_answers(self, fields: dict[str, Any]) -> None:
        bad = [prompt for prompt, answer in fields["answers"] if is_degenerate(answer)]
        self._set("repeating", bool(bad), fields["step"],
                  f"the answer to '{(bad or [''])[0]}' is empty or repeats itself. Often a "
                  "learning rate that is too high, or an end of turn that is not trained.",
        )  # fmt: skip

    def _set(self, code: str, is_on: bool, step: int, message: str) -> None:
        """Sounds an alarm at the start of its episode."""
        if is_on and code not in self._sounding:
            self._emit("alarm", code=code, message=message, step=step)
        (self._sounding.add if is_on else self._sounding.discard)(code)


def is_degenerate(answer: str) -> bool:
    """Whether an answer is empty or is one piece said ``REPEATS`` times at its end.

    >>> is_degenerate(" "), is_degenerate("no no no no no"), is_degenerate("an owl")
    (True, True, False)
    """
    text = "".join(answer.split())
    if not text:
        return True
    for size in range(1, len(text) // REPEATS + 1):
        if text.endswith(text[-size:] * REPEATS) and (size > 1 or len(text) > 2 * REPEATS):
            return True
    return False
