"""Which validation was the best, and when to stop looking for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakeet.base.errors import RequestError
from lorakeet.base.recipe import EarlyStopping

HIGHER_IS_BETTER = frozenset({"accuracy", "f1"})


@dataclass
class BestTracker:
    """Keeps the best look and counts the looks since.

    Args:
        metric: the name of the value that is watched.
        patience: looks without improvement before ``should_stop``; None never stops.
    """

    metric: str
    patience: int | None
    best_step: int = -1
    best_values: dict[str, float] = field(default_factory=dict)
    looks_since: int = 0

    @classmethod
    def build(cls, settings: EarlyStopping | None, *, is_classifier: bool) -> BestTracker:
        """The tracker of a recipe; a classifier has no perplexity, so its loss is watched."""
        metric = settings.metric if settings else "loss"
        if is_classifier and metric == "perplexity":
            metric = "loss"
        return cls(metric=metric, patience=settings.patience if settings else None)

    def observe(self, step: int, values: Mapping[str, float]) -> bool:
        """Takes a look's values; True when they are the best so far.

        Raises:
            RequestError: the validation measures other things than the watched metric.
        """
        if not values:
            return False
        if self.metric not in values:
            raise RequestError(
                f"train.early_stopping.metric is '{self.metric}', but the validation of this task "
                f"measures {', '.join(sorted(values))}. Choose one of these, or early_stopping: "
                "null."
            )
        value = values[self.metric]
        is_better = math.isfinite(value) and (
            not self.best_values or self._beats(value, self.best_values[self.metric])
        )
        if is_better:
            self.best_step, self.best_values, self.looks_since = step, dict(values), 0
        else:
            self.looks_since += 1
        return is_better

    @property
    def should_stop(self) -> bool:
        """Whether the patience is used up."""
        return self.patience is not None and self.looks_since >= self.patience

    def to_progress(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "best_step": self.best_step,
            "best_values": self.best_values,
            "looks_since": self.looks_since,
        }

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Takes back what ``to_progress`` gave."""
        self.best_step = progress["best_step"]
        self.best_values = dict(progress["best_values"])
        self.looks_since = progress["looks_since"]

    def _beats(self, value: float, best: float) -> bool:
        return value > best if self.metric in HIGHER_IS_BETTER else value < best
