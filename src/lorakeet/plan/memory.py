"""Memory of training, one formula a part.

With N parameters in linear layers, M in all other modules, P trained,
w bytes a weight (4 on a CPU, 2 on a GPU):

    weights       full, lora: w (N + M)     lora-8bit: N + w M     qlora: 0.516 N + w M
    adapter       4 P                       A, B and saved modules in float32; nothing for full
    gradients     4 P                       (2 P for full in bfloat16)
    optimizer     8 P                       AdamW's two moments in float32
    activations   T (16 H + 4 F) L w        T tokens a micro-batch, as kept for backward
                  + 2 x 4 C                 one chunk of C logits and its gradient

0.516 bytes is NF4 with double quantisation: 4 bits, 8-bit scales of blocks of 64,
and float32 scales of 256 of these (arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lorakeet.plan.model_facts import ModelFacts

KINDS = ("full", "lora", "lora-8bit", "qlora")
BYTES_OF_LINEAR = {"lora-8bit": 1.0, "qlora": 0.516}
CHUNK_LOGITS = 4_000_000
AUTO_MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class MemoryParts:
    """Predicted bytes by part."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Parts and total as plain JSON."""
        return {**asdict(self), "total": self.total}


def estimate_memory(
    facts: ModelFacts, kind: str, *, trained_parameters: int, micro_batch_tokens: int, is_gpu: bool
) -> MemoryParts:
    """Predicted bytes of a method.

    Args:
        kind: one of ``KINDS``.
        trained_parameters: P.
        micro_batch_tokens: T, padded tokens that pass the model at once.
    """
    w = 2 if is_gpu else 4
    linear = facts.linear_parameters
    weights = BYTES_OF_LINEAR.get(kind, w) * linear + w * (facts.parameters - linear)
    per_layer = micro_batch_tokens * (16 * facts.hidden + 4 * facts.ffn) * w
    head = 2 * 4 * min(CHUNK_LOGITS, micro_batch_tokens * facts.vocabulary)
    return MemoryParts(
        weights=int(weights),
        adapter=0 if kind == "full" else 4 * trained_parameters,
        gradients=(w if kind == "full" else 4) * trained_parameters,
        optimizer=8 * trained_parameters,
        activations=per_layer * facts.layers + head,
    )
