"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from lorakeet.base.recipe import TrainSettings


def rate_at(step: int, num_steps: int, settings: TrainSettings) -> float:
    """The learning rate of an optimiser step.

    With W = warm-up steps and u = (step - W) / (num_steps - W):

        step <= W   peak * step / W
        cosine      peak * (1 + cos(pi u)) / 2
        linear      peak * (1 - u)
        constant    peak

    Args:
        step: counted from 1.

    Guarantees: positive at every step of the run; the peak at step W (or 1).

    >>> rate_at(1, 100, TrainSettings(learning_rate=1.0, warmup_fraction=0.04))
    0.25
    """
    peak = settings.learning_rate
    warmup = round(settings.warmup_fraction * num_steps)
    if step <= warmup:
        return peak * step / warmup
    u = (step - max(warmup, 1)) / max(1, num_steps - max(warmup, 1) + 1)
    if settings.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * u)) / 2
    if settings.schedule == "linear":
        return peak * (1 - u)
    return peak
