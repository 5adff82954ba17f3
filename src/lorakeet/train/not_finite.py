"""What is told of a step whose loss, gradient or weights are no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lorakeet.base.errors import BadBatchError
from lorakeet.base.records import EncodedSample


def name_not_finite(model: nn.Module) -> str:
    """Which weights and gradients hold NaN or infinity, as the end of a sentence."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [name for name, p in named if not torch.isfinite(p).all()]
    gradients = [
        name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    told = [
        f"; not finite is the {what} of {names[0]}"
        + (f" and {len(names) - 1} more" * (len(names) > 1))
        for what, names in (("weight", weights), ("gradient", gradients))
        if names
    ]
    return "".join(told)


def to_not_finite_error(
    found: str, samples: Sequence[EncodedSample], step: int, *, is_in_weights: bool
) -> BadBatchError:
    """The error of a step that must not happen, with the rows it saw."""
    rows = ", ".join(str(sample.origin) for sample in samples[:4])
    more = f" and {len(samples) - 4} more" if len(samples) > 4 else ""
    remedy = (
        "The weights were spoiled before this step: resume from the newest checkpoint."
        if is_in_weights
        else "Lower train.learning_rate, and look at these rows with 'lorakeet data show'; "
        "train.skip_bad_batches passes over single ones."
    )
    return BadBatchError(
        f"step {step}: {found}; needed are finite numbers. The optimiser did not step, so the "
        f"weights are untouched. The rows were {rows}{more}. {remedy}",
        rows=[str(sample.origin) for sample in samples], is_in_weights=is_in_weights,
    )  # fmt: skip
