"""Samples of different length as one padded batch.

Legend: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorakeet.base.errors import RequestError
from lorakeet.base.records import Batch, EncodedSample


def collate(samples: Sequence[EncodedSample], pad_id: int) -> Batch:
    """Rows padded on the right; padding is never attended to and never a target.

    Raises:
        RequestError: there is no sample, or no sample has anything to train.
    """
    if not samples:
        raise RequestError("a batch needs at least one sample.")
    longest = max(len(sample.ids) for sample in samples)
    shape = (len(samples), longest)
    ids_BT = np.full(shape, pad_id, dtype=np.int64)
    attention_BT = np.zeros(shape, dtype=bool)
    mask_BT = np.zeros(shape, dtype=bool)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids_BT[row, :length] = sample.ids
        attention_BT[row, :length] = True
        mask_BT[row, :length] = sample.mask
    labels_B = np.asarray([sample.label for sample in samples], dtype=np.int64)
    batch = Batch(ids_BT=ids_BT, attention_BT=attention_BT, mask_BT=mask_BT, labels_B=labels_B)
    if not batch.num_targets:
        places = ", ".join(str(sample.origin) for sample in samples[:3])
        raise RequestError(f"a batch without any trained token ({places}) cannot be built.")
    return batch
