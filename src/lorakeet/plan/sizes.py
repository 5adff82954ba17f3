"""Which card trains which size: models from 0.5B to 70B against common cards.

The shapes are those of open models of these sizes (Qwen2.5, and Llama 3 at 70B), so head
and embeddings weigh what they weigh there; memory is ``plan.memory``'s for a GPU, at the
recipe's rank, micro-batch and optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorakeet.base.recipe import Recipe
from lorakeet.base.units import GIB
from lorakeet.plan.hardware import Hardware
from lorakeet.plan.memory import (
    KINDS,
    count_micro_batch_tokens,
    estimate_memory,
    to_memory_case,
)
from lorakeet.plan.model_facts import ModelFacts, build_facts
from lorakeet.plan.trained import count_trained

CARDS_GIB = (8, 10, 12, 16, 24, 48, 80)
CARD_FRACTION = 0.9  # of a card; the rest is for its driver and for fragments
EXACT_FIRST = ("full", "lora", "lora-8bit", "qlora")
# model_type, hidden, layers, heads, key-value heads, feed-forward width, vocabulary, tied
SHAPES: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "0.5B": ("qwen2", 896, 24, 14, 2, 4864, 151936, True),
    "1.5B": ("qwen2", 1536, 28, 12, 2, 8960, 151936, True),
    "3B": ("qwen2", 2048, 36, 16, 2, 11008, 151936, True),
    "7B": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False),
    "14B": ("qwen2", 5120, 48, 40, 8, 13824, 152064, False),
    "32B": ("qwen2", 5120, 64, 40, 8, 27648, 152064, False),
    "70B": ("llama", 8192, 80, 64, 8, 28672, 128256, False),
}


@dataclass(frozen=True, kw_only=True)
class SizePlan:
    """One size of model.

    Args:
        needed_bytes: by method, on a GPU.
        on_cards: a card's GiB -> the first of full, lora, lora-8bit and qlora that fits, or None.
        here: the same for this machine.
    """

    size: str
    parameters: int
    needed_bytes: dict[str, int]
    on_cards: dict[int, str | None]
    here: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**vars(self), "on_cards": {str(k): v for k, v in self.on_cards.items()}}


def plan_sizes(recipe: Recipe, machine: Hardware) -> list[SizePlan]:
    """Every size with what it needs and where it fits, at a recipe's settings."""
    return [_plan_size(size, recipe, machine) for size in SHAPES]


def build_shape(size: str) -> ModelFacts:
    """The facts of a model of a size.

    >>> round(build_shape("7B").parameters / 1e9, 2)
    7.62
    """
    kind, hidden, layers, heads, kv_heads, ffn, vocabulary, is_tied = SHAPES[size]
    return build_facts({
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn,
        "vocab_size": vocabulary, "tie_word_embeddings": is_tied,
    })  # fmt: skip


def _plan_size(size: str, recipe: Recipe, machine: Hardware) -> SizePlan:
    facts = build_shape(size)
    on_card = {kind: _need(facts, kind, recipe, is_gpu=True) for kind in KINDS}
    has_gpu = bool(machine.gpus)
    here = on_card if has_gpu else {kind: _need(facts, kind, recipe, is_gpu=False)
                                    for kind in KINDS}  # fmt: skip
    return SizePlan(
        size=size, parameters=facts.parameters, needed_bytes=on_card,
        on_cards={card: _first_that_fits(on_card, card * GIB) for card in CARDS_GIB},
        here=_first_that_fits(here, machine.usable_bytes),
    )  # fmt: skip


def _need(facts: ModelFacts, kind: str, recipe: Recipe, *, is_gpu: bool) -> int:
    """Predicted bytes of a method for a decoder of this shape."""
    counted = count_trained(facts, recipe.method, is_classifier=False)
    case = to_memory_case(
        recipe, counted, micro_batch_tokens=count_micro_batch_tokens(recipe), is_gpu=is_gpu
    )
    return estimate_memory(facts, kind, case).total


def _first_that_fits(needed: dict[str, int], room: int) -> str | None:
    fitting = (kind for kind in EXACT_FIRST if needed[kind] <= CARD_FRACTION * room)
    return next(fitting, None)
