"""One recipe on one machine: what all methods of a plan have in common."""

from __future__ import annotations

from dataclasses import dataclass

from lorakeet.base.recipe import Recipe
from lorakeet.plan.hardware import Hardware
from lorakeet.plan.memory import MemoryCase, MemoryParts, estimate_memory, to_memory_case
from lorakeet.plan.model_facts import ModelFacts
from lorakeet.plan.speed import Rates, estimate_tokens_per_s
from lorakeet.plan.trained import TrainedCount

HEADROOM_FRACTION = 0.9  # of the free memory; the rest is for the system and fragments


@dataclass(frozen=True, kw_only=True)
class PlanCase:
    """What all methods of one plan have in common.

    Args:
        micro_batch_tokens: T, of the largest micro-batch.
        row_tokens: of the sample that a token stands in, on average over tokens.
        longest_row: tokens of the longest sample, as far as it is known.
        rates: None where the card is not known.
        num_run_tokens: of all epochs; None where the data are not known.
    """

    recipe: Recipe
    facts: ModelFacts
    counted: TrainedCount
    machine: Hardware
    micro_batch_tokens: int
    row_tokens: float
    longest_row: int
    rates: Rates | None
    num_run_tokens: int | None
    price_per_hour: float | None

    @property
    def room(self) -> int:
        """Bytes that training may take."""
        return int(HEADROOM_FRACTION * self.machine.usable_bytes)

    def trained_by(self, kind: str) -> int:
        """P of a method."""
        return self.facts.parameters if kind == "full" else self.counted.total

    def can_train(self, kind: str) -> bool:
        """Whether the names that an adapter needs are the model's."""
        return kind == "full" or not self.counted.is_misnamed

    def at(self, micro_batch_tokens: int) -> MemoryCase:
        """What memory and time depend on, with T tokens in a micro-batch."""
        return to_memory_case(
            self.recipe, self.counted, micro_batch_tokens=micro_batch_tokens,
            is_gpu=bool(self.machine.gpus),
        )  # fmt: skip

    def memory_of(self, kind: str, micro_batch_tokens: int) -> MemoryParts:
        """Predicted bytes of a method."""
        return estimate_memory(self.facts, kind, self.at(micro_batch_tokens))

    def speed_of(self, kind: str) -> float | None:
        """Predicted tokens a second of a method."""
        if self.rates is None:
            return None
        return estimate_tokens_per_s(
            self.facts, kind, self.rates, self.at(self.micro_batch_tokens),
            row_tokens=self.row_tokens,
            step_tokens=self.recipe.train.batch_size * self.row_tokens,
        )  # fmt: skip
