"""Prepared rows as tensors, in batches of similar length, for a pass without training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorakeet.base.errors import MachineError, RequestError
from lorakeet.base.events import Emit
from lorakeet.base.records import EncodedSample
from lorakeet.data.collate import collate
from lorakeet.data.order import split_micro_batches
from lorakeet.models.out_of_memory import halve_until_fits

T = TypeVar("T")
DEFAULT_MAX_TOKENS = 4096


@dataclass
class BatchLimit:
    """The tokens that pass the model at once in an evaluation; what fitted once is kept.

    Args:
        emit: told when memory runs out.
    """

    emit: Emit
    max_tokens: int = DEFAULT_MAX_TOKENS

    def measure(self, measure: Callable[[int], T], reader: Any) -> T:
        """``measure(max_tokens)`` over a reader's rows, begun again with half on a lack of memory.

        Raises:
            MachineError: the longest row alone does not fit.
        """
        result, self.max_tokens = halve_until_fits(
            measure, self.max_tokens, lambda size: self._halve(size, int(max(reader.lengths)))
        )
        return result

    def _halve(self, size: int, longest: int) -> int:
        if size <= longest:
            raise MachineError(
                f"evaluation: memory ran out with a single row of {longest:,} tokens. Lower "
                f"data.max_tokens below {longest:,}, or free memory."
            )
        half = max(size // 2, longest)
        self.emit(
            "alarm", code="out-of-memory", step=0, max_tokens=half, before_tokens=size,
            message=f"evaluation: memory ran out with {size:,} tokens at once; it goes on with "
            f"{half:,}. The figures stay the same.",
        )  # fmt: skip
        return half


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
