"""How surprised a model is by held-out text: exp of the mean loss of a trained token.

    loss = sum over all rows and targets of -log p(target) / number of targets
    perplexity = exp(loss)

The sum is divided once, at the end.  A mean of batch means would weigh a token
by the length of its neighbours and change with the batch size.
"""

from __future__ import annotations

import math
from typing import Any

from lorakeet.base.errors import NumericsError
from lorakeet.evaluate.batches import DEFAULT_MAX_TOKENS, iterate_batches
from lorakeet.infer.mode import evaluation_mode
from lorakeet.models.score import score_targets

_LARGEST_EXPONENT = 700.0  # exp(710) overflows a float, and JSON has no infinity


def measure_perplexity(
    model: Any, reader: Any, pad_id: int, max_tokens: int = DEFAULT_MAX_TOKENS
) -> dict[str, float]:
    """Loss and perplexity over all rows of a reader, every trained token with the same weight.

    Args:
        model: its training mode is kept; dropout is off meanwhile.
        reader: a ``ShardReader`` with at least one row.
        max_tokens: padded tokens that pass the model at once; changes memory, not the result.

    Returns:
        ``loss`` in nats a token, ``perplexity`` (at most e^700) and ``num_targets``.

    Raises:
        RequestError: the reader is empty.
        NumericsError: the loss is NaN or infinite.
    """
    total, num_targets = 0.0, 0
    with evaluation_mode(model):
        for _, tensors in iterate_batches(reader, pad_id, max_tokens, model.device):
            loss_sum, count = score_targets(
                model, tensors["ids_BT"], tensors["attention_BT"], tensors["mask_BT"]
            )
            total += float(loss_sum)
            num_targets += int(count)
    loss = total / num_targets
    if not math.isfinite(loss):
        raise NumericsError(
            f"The validation loss over {num_targets:,} tokens is {loss}. The weights are damaged: "
            "lower train.learning_rate, or go back to an earlier checkpoint."
        )
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, _LARGEST_EXPONENT)),
        "num_targets": num_targets,
    }
