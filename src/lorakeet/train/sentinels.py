"""What a run looks at in its tensors so that the alarms, which see events only, can judge it.

rows without a target   such a row teaches nothing and is passed over by name
the first batch         before step 1 the tuned model must answer like its base
factors at zero         A and B start as (random, zero); both must move
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorakeet.adapters.attach import adapter_names, no_adapter
from lorakeet.base.errors import BadBatchError
from lorakeet.base.records import EncodedSample
from lorakeet.data.collate import collate
from lorakeet.data.order import split_micro_batches
from lorakeet.train.step import score_batch

SHOWN = 3


def split_targets(
    rows: Sequence[EncodedSample],
) -> tuple[list[EncodedSample], list[EncodedSample]]:
    """Rows that have something to train, and rows that have not."""
    with_target = [row for row in rows if row.mask.any() or row.label >= 0]
    without = [row for row in rows if not (row.mask.any() or row.label >= 0)]
    return with_target, without


def to_no_target_error(step: int, rows: Sequence[EncodedSample]) -> BadBatchError:
    """What is told of rows that teach nothing; raised when a step has no others."""
    return BadBatchError(
        f"step {step}: {len(rows)} rows have no trained token, such as {rows[0].origin}; they are "
        "passed over. Give them an answer or remove them: 'lorakeet data show' shows what is "
        "trained.",
        rows=[str(row.origin) for row in rows],
    )


@torch.no_grad()
def measure_first_batch(
    model: nn.Module, rows: Sequence[EncodedSample], *, pad_id: int, max_tokens: int
) -> dict[str, float | None]:
    """The loss of the first micro-batch, of the base on it, and of a guess among all tokens.

    Args:
        model: in evaluation mode afterwards; its weights are read only.

    Returns:
        nats a target: ``loss``; ``base_loss``, None without an adapter; and
        ``uniform_loss`` = ln V, None for a classifier, whose head is new.
    """
    model.eval()
    group = split_micro_batches([len(row.ids) for row in rows], max_tokens)[0]
    batch = collate([rows[place] for place in group], pad_id)
    device = next(model.parameters()).device
    loss = float(score_batch(model, batch, device)) / batch.num_targets
    base_loss = None
    if adapter_names(model):
        with no_adapter(model):
            base_loss = float(score_batch(model, batch, device)) / batch.num_targets
    vocabulary: Any = getattr(getattr(model, "config", None), "vocab_size", None)
    uniform = math.log(vocabulary) if vocabulary and batch.mask_BT.any() else None
    return {"loss": loss, "base_loss": base_loss, "uniform_loss": uniform}


@torch.no_grad()
def measure_rows(
    model: nn.Module, rows: Sequence[EncodedSample], *, pad_id: int, max_tokens: int
) -> float:
    """The loss of rows in nats a target, each target with the same weight.

    Args:
        model: in evaluation mode afterwards.
        max_tokens: padded tokens that pass the model at once.
    """
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for group in split_micro_batches([len(row.ids) for row in rows], max_tokens):
        batch = collate([rows[place] for place in group], pad_id)
        total += float(score_batch(model, batch, device))
        count += batch.num_targets
    return total / count


def count_zero_factors(model: nn.Module) -> dict[str, Any]:
    """How many trained A and B there are, how many are zero throughout, and a few names."""
    factors = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" in name
    }
    zero = [name for name, parameter in factors.items() if not parameter.any()]
    return {"num_factors": len(factors), "num_zero": len(zero), "zero": zero[:SHOWN]}
