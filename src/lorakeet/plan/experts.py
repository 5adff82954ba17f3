"""What a mixture of experts keeps for its backward pass, in transformers' grouped products.

Of E experts of width F a token passes k.  A layer with experts keeps for each token, in the
place of the feed-forward part's 2 F or 3 F:

    3 k F     gate and up, which lie in one array, and the gate's answer; where the experts are
              trained, by weight or by adapter, also their product: 4 k F
    k D       the experts' answers, which the router's shares weigh; where the experts are
              trained, also the gathered inputs: 2 k D
    D         the shared expert's answer; without one an adapter keeps one D less, as nothing
              needs the answer of the norm before the experts
    E + 9 k   the router's shares of all experts, and of the chosen ones with their places

counted as autograd saves them.  Adapted stacks are held besides as W' = W + s B A, however many
tokens there are, from the forward pass to the backward pass; there the gradient of the largest
one and the change of W come to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakeet.plan.model_facts import ModelFacts
from lorakeet.plan.trained import TrainedCount


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model.

    Args:
        num_layers: layers that have them.
        num: E of a layer.
        used: k, that a token passes.
        width: F of one.
    """

    num_layers: int
    num: int
    used: int
    width: int


def find_experts(facts: ModelFacts) -> Experts | None:
    """The experts of a known architecture; None where there are none or their sizes are unknown."""
    for part in facts.parts:
        if part.kind == "experts" and part.num_in:
            num = part.weights // (3 * part.num_in * part.num_out)
            return Experts(num_layers=part.count, num=num, used=round(part.used_fraction * num),
                           width=part.num_out)  # fmt: skip
    return None


def count_routed(facts: ModelFacts, *, is_adapter: bool, counted: TrainedCount) -> int:
    """Numbers that the experts of all layers keep a token; 0 without experts.

    Args:
        is_adapter: whether an adapter is trained, and not all weights.
    """
    found = find_experts(facts)
    if not found:
        return 0
    are_trained = not is_adapter or counted.stacked_parameters > 0
    has_shared = facts.ffn > found.used * found.width
    inner = (3 + are_trained) * found.width + (1 + are_trained) * facts.hidden
    other = has_shared - (is_adapter and not has_shared)
    each = found.used * (inner + 9) + other * facts.hidden + found.num
    return found.num_layers * each


def count_dense_width(facts: ModelFacts) -> int:
    """Feed-forward widths of all layers together, the routed experts left out."""
    found = find_experts(facts)
    return facts.ffn * facts.layers - (
        found.num_layers * found.used * found.width if found else 0
    )  # fmt: skip


def count_stacks(counted: TrainedCount, num_recomputed: int = 1) -> int:
    """Numbers of the W' of all adapted stacks, and what the largest adds in its backward pass.

    Args:
        num_recomputed: layers that are computed again one by one, so that one has its W'.
    """
    return counted.stacked_parameters // num_recomputed + 2 * counted.largest_stack
