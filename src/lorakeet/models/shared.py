"""The loss of a pack whose samples share their openings.

    loss_sum = - sum over samples and their targets t of log p(x_t | x_<t)

An opening stands once in the row.  A token that follows it in several samples is
predicted from the same last state of the opening, once for each; a trained token of
the opening counts once for each sample that trains it.  Gradients add up the same way,
so loss and gradients are those of the samples one at a time.

Legend: T tokens of the row, N targets, S segments, D hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakeet.base.records import Pack
from lorakeet.models.head import backbone_of, head_of, read_head_facts, soft_cap_of
from lorakeet.models.packed import packed, read_pack_facts
from lorakeet.models.score import score_hidden


def score_shared_pack(model: nn.Module, pack: Pack, device: torch.device | str) -> Tensor:
    """The summed loss over all targets of all samples.

    The model must share openings exactly (``PackFacts.is_shareable``).

    Returns:
        float32 scalar in nats with its graph.
    """
    predictors_N, targets_N = (torch.from_numpy(x).to(device) for x in find_predictors(pack))
    first = read_pack_facts(model).first_position
    row = {
        "input_ids": torch.from_numpy(pack.ids_T)[None].to(device),
        "position_ids": torch.from_numpy(pack.positions_T + first)[None].to(device),
        "use_cache": False,
    }
    is_plain = read_head_facts(model).is_plain
    with packed(model, pack.bounds, pack.parents):
        answer_TX = (backbone_of(model) if is_plain else model)(**row)[0][0]
    # index_select, as its backward adds up in one order, which indexing with repeats need not
    answer_NX = answer_TX.index_select(0, predictors_N)
    if not is_plain:
        return F.cross_entropy(answer_NX.float(), targets_N, reduction="sum")
    return score_hidden(answer_NX, head_of(model), targets_N, soft_cap_of(model))


def find_predictors(pack: Pack) -> tuple[np.ndarray, np.ndarray]:
    """The place in the row that predicts each target, and the target's id.

    A token is predicted by the one before it, the first of a segment by the last of its
    parent.

    Returns:
        int64 [N] and int64 [N]; a target of several samples stands several times.
    """
    before_T = np.arange(len(pack.ids_T)) - 1
    for start, parent in zip(pack.bounds, pack.parents, strict=False):
        if parent >= 0:
            before_T[start] = pack.bounds[parent + 1] - 1
    return np.repeat(before_T, pack.counts_T), np.repeat(pack.ids_T, pack.counts_T)
