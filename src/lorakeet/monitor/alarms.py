"""Alarms: what looks wrong in the stream of events, in plain words with a remedy.

    overfit       validation loss >= 1.3 x training loss, and rising above its best
    spike         loss > 3 x the median of the last 60 steps, and > 1.5 x the highest of them
    stuck         the gradient is exactly zero, so nothing is learned
    zero          the loss is exactly zero
    plateau       the median loss of the last 60 steps is not below that of the 60 before, both
                  are known to 10 %, and no look in between found a better validation loss
    zero-factor   an A or B of the adapter is still zero at a look after step 3
    unlike-base   before step 1 the loss is not the base's, as a new adapter's must be
    no-knowledge  before step 1 the loss is that of a guess among all tokens, ln V
    repeating     a sample answer says one thing over and over, or nothing

An alarm sounds once an episode.  A step that looks well does not end one, or a noisy
run would be told the same again and again: spike, stuck and zero end after 20 good
steps, overfit when the gap has closed, and a plateau when the loss has fallen by 10 %.

The training loop itself tells bad-batch (NaN or infinity) and no-target (rows without
a trained token), as only it can act on them.
"""

from __future__ import annotations

from collections import Counter, deque
from statistics import median
from typing import Any

from lorakeet.base.events import Emit

OVERFIT_RATIO = 1.3
SPIKE_RATIO = 3.0
SPIKE_OVER_HIGHEST = 1.5  # rows of several kinds have losses that differ by nature
SPIKE_WINDOW_STEPS = 60
SPIKE_FEWEST_STEPS = 20
PLATEAU_STEPS = 60
PLATEAU_GAIN_FRACTION = 0.005
PLATEAU_NOISE_FRACTION = 0.1
PLATEAU_END_FRACTION = 0.1  # five times the noise of a median of 60 losses that vary by 10 %
GOOD_STEPS = 20
FACTOR_STEPS = 3
START_TOLERANCE = 1e-3
GUESS_FRACTION = 0.95
REPEATS = 4


class AlarmWatch:
    """A sink that hears steps, evaluations and sample answers, and emits alarms.

    Args:
        emit: told of each alarm as ``emit("alarm", code=, message=, step=)``.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW_STEPS)
        self._losses: deque[float] = deque(maxlen=2 * PLATEAU_STEPS)
        self._best_validation = float("inf")
        self._sounding: set[str] = set()
        self._good_steps: Counter[str] = Counter()
        self._plateau_loss = float("inf")

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Hears one event."""
        if kind == "step":
            self._hear_step(fields)
        elif kind == "evaluation":
            self._hear_evaluation(fields)
        elif kind == "sample_answers":
            self._hear_answers(fields)
        elif kind == "first_batch":
            self._hear_first_batch(fields)
        elif kind == "factors":
            self._hear_factors(fields)

    def _hear_step(self, fields: dict[str, Any]) -> None:
        step, loss = fields["step"], fields["loss"]
        recent = list(self._recent)
        usual = median(recent) if len(recent) >= SPIKE_FEWEST_STEPS else float("inf")
        is_spike = loss > max(SPIKE_RATIO * usual, SPIKE_OVER_HIGHEST * max(recent, default=loss))
        self._hold("spike", is_spike, step,
                  f"the loss is {loss:.3g}, and was {usual:.3g} before. Often one odd batch, "
                  "or a learning rate that is too high: lower train.learning_rate.")  # fmt: skip
        self._hold("stuck", fields["gradient_norm"] == 0, step,
                  "the gradient is exactly zero, so nothing is learned. No trained parameter "
                  "reaches the loss: check method.targets.")  # fmt: skip
        self._hold("zero", loss == 0, step,
                  "the loss is exactly zero. Either the samples are known by heart or hardly any "
                  "token is trained: look at them with 'lorakeet data show'.")  # fmt: skip
        if not is_spike:
            self._recent.append(loss)
        self._losses.append(loss)
        self._watch_plateau(step)

    def _watch_plateau(self, step: int) -> None:
        losses = list(self._losses)
        if len(losses) < 2 * PLATEAU_STEPS:
            return
        older, newer = median(losses[:PLATEAU_STEPS]), median(losses[PLATEAU_STEPS:])
        is_flat = newer > (1 - PLATEAU_GAIN_FRACTION) * older and newer > 0.05
        is_flat &= _noise_of_median(losses) < PLATEAU_NOISE_FRACTION * newer
        if is_flat and "plateau" not in self._sounding:
            self._plateau_loss = newer
        is_over = newer < (1 - PLATEAU_END_FRACTION) * self._plateau_loss
        self._set("plateau", is_flat, step,
                  f"the loss has stayed near {newer:.3g} for {2 * PLATEAU_STEPS} steps. Either the "
                  "model has learned what it can: stop, the best weights are kept. Or the rate is "
                  "too low: raise train.learning_rate.",
                  is_over=is_over)  # fmt: skip

    def _hear_first_batch(self, fields: dict[str, Any]) -> None:
        loss, base, guess = fields["loss"], fields.get("base_loss"), fields.get("uniform_loss")
        is_unlike = base is not None and not _are_close(loss, base)
        self._set("unlike-base", is_unlike and fields.get("starts_at_base", True), fields["step"],
                  f"before the first step the loss is {loss:.4g}, and {base or 0:.4g} without the "
                  "adapter. An empty adapter changes nothing, so this one is not empty, or its "
                  "layers do not hand the base's values on: prove it with 'lorakeet verify "
                  "adapter', or start anew with method.start: default.")  # fmt: skip
        is_guess = guess is not None and loss >= GUESS_FRACTION * guess
        self._set("no-knowledge", is_guess, fields["step"],
                  f"before the first step the loss is {loss:.3g} nats, and a guess among all "
                  f"tokens has {guess or 0:.3g}: the base knows nothing of this text. Check that "
                  "base and tokenizer belong together and that the base is trained.")  # fmt: skip

    def _hear_factors(self, fields: dict[str, Any]) -> None:
        is_bad = fields["step"] >= FACTOR_STEPS and fields["num_zero"] > 0
        self._set("zero-factor", is_bad, fields["step"],
                  f"{fields['num_zero']} of {fields['num_factors']} trained factors are still zero "
                  f"after {fields['step']} steps, such as {', '.join(fields['zero'])}. No gradient "
                  "reaches these layers: take them out of method.targets, unless they are experts "
                  "that no token was sent to.")  # fmt: skip

    def _hear_evaluation(self, fields: dict[str, Any]) -> None:
        seen, trained = fields["values"].get("loss"), fields.get("train_loss")
        if seen is None or not trained:
            return
        is_overfit = seen >= OVERFIT_RATIO * trained and seen > self._best_validation
        if seen < (1 - PLATEAU_GAIN_FRACTION) * self._best_validation:
            self._losses.clear()  # whatever the noise of the steps says, the model still learns
        self._best_validation = min(self._best_validation, seen)
        self._set("overfit", is_overfit, fields["step"],
                  f"the validation loss ({seen:.3g}) is {seen / trained:.1f} x the training loss "
                  f"({trained:.3g}) and rising. The model learns the rows by heart: fewer epochs, "
                  "more data, or a smaller rank. The best weights are kept.",
                  is_over=seen < OVERFIT_RATIO * trained)  # fmt: skip

    def _hear_answers(self, fields: dict[str, Any]) -> None:
        bad = [prompt for prompt, answer in fields["answers"] if is_degenerate(answer)]
        self._set("repeating", bool(bad), fields["step"],
                  f"the answer to '{(bad or [''])[0]}' is empty or repeats itself. Often "
                  "the learning rate is too high: lower train.learning_rate. Or the end of the "
                  "answers is not trained: look at it with 'lorakeet data show'.",
        )  # fmt: skip

    def _hold(self, code: str, is_on: bool, step: int, message: str) -> None:
        """An alarm about single steps; some good steps in a row end its episode."""
        self._good_steps[code] = 0 if is_on else self._good_steps[code] + 1
        self._set(code, is_on, step, message, is_over=self._good_steps[code] >= GOOD_STEPS)

    def _set(
        self, code: str, is_on: bool, step: int, message: str, *, is_over: bool | None = None
    ) -> None:
        """Sounds an alarm at the start of its episode; ``is_over`` is by default not ``is_on``."""
        if is_on and code not in self._sounding:
            self._sounding.add(code)
            self._emit("alarm", code=code, message=message, step=step)
        elif not is_on if is_over is None else is_over:
            self._sounding.discard(code)


def _noise_of_median(losses: list[float]) -> float:
    """Two standard errors of the difference of the medians of the halves of ``losses``.

    SE = 1.25 sigma / sqrt(n / 2),   sigma = 1.48 median |x - median(x)|
    """
    middle = median(losses)
    sigma = 1.48 * median(abs(loss - middle) for loss in losses)
    return 2 * 2**0.5 * 1.25 * sigma / (len(losses) / 2) ** 0.5


def _are_close(one: float, two: float) -> bool:
    return abs(one - two) <= START_TOLERANCE * max(1.0, abs(two))


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
