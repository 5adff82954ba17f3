"""Prepared rows as tensors, in batches of similar length, for a pass without training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lorakeet.base.errors import RequestError
from lorakeet.base.records import EncodedSample
from lorakeet.data.collate import collate
from lorakeet.data.order import split_micro_batches

DEFAULT_MAX_TOKENS = 4096


def iterate_batches(
    reader: Any, pad_id: int, max_tokens: int, device: torch.device
) -> Iterator[tuple[list[EncodedSample], dict[str, Tensor]]]:
    """All rows once, the longest first, so that a lack of memory shows at once.

    Args:
        reader: a ``ShardReader``, or any sequence of samples with ``lengths``.
        max_tokens: padded tokens of a batch; a single longer row stands alone.

    Yields:
        the samples, and their tensors ``ids_BT``, ``attention_BT``, ``mask_BT``, ``labels_B``.

    Raises:
        RequestError: there is no row.
    """
    if not len(reader):
        raise RequestError(
            "There is no row to evaluate on. Set data.validation to a share above 0 or to a file."
        )
    lengths = [int(length) for length in reader.lengths]
    for places in split_micro_batches(lengths, max_tokens):
        samples = [reader[place] for place in places]
        batch = collate(samples, pad_id)
        arrays = {
            "ids_BT": batch.ids_BT,
            "attention_BT": batch.attention_BT,
            "mask_BT": batch.mask_BT,
            "labels_B": batch.labels_B,
        }
        yield samples, {name: torch.from_numpy(a).to(device) for name, a in arrays.items()}
