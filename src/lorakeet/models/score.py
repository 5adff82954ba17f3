"""Masked token log-likelihood as (sum, count), never the whole logits.

    loss_sum = - sum over targets t of log p(x_t | x_<t)

Only positions that predict a target pass the output head, in chunks of rows, and
the gradients are formed in the forward pass:

    p = softmax(h W^T) - onehot,   dh = p W,   dW = p^T h (when the head is trained)

so that a chunk's logits live for a moment and nothing is computed twice.  A frozen head
in float32 goes block by block of the vocabulary instead (``models.frozen_head``).  The
caller divides once, by the step's count: this is why 1 x 8, 2 x 4 and 8 x 1
micro-batches give the same gradient.

Legend: B rows, T tokens, N targets, D hidden, V vocabulary, C classes.
Source: the chunked head is the idea of arXiv:2410.10989 (fused linear cross-entropy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorakeet.adapters.fused import sum_products
from lorakeet.base.errors import RequestError
from lorakeet.models.frozen_head import FrozenHead, is_frozen
from lorakeet.models.head import backbone_of, bend, head_of, read_head_facts, soft_cap_of
from lorakeet.models.kernels import load_head
from lorakeet.models.packed import first_tokens_only, packed, read_pack_facts
from lorakeet.quant.narrow import NarrowHead

CHUNK_LOGITS = 4_000_000
GPU_CHUNK_LOGITS = 2**26  # 128 MiB at 16 bits; 441 rows of 151,936, above what reading W costs


def score_targets(
    model: nn.Module, ids_BT: Tensor, attention_BT: Tensor, mask_BT: Tensor
) -> tuple[Tensor, int]:
    """The summed loss over targets, and their number.

    Args:
        ids_BT: int64, padded on the right.
        attention_BT: bool, True at real tokens.
        mask_BT: bool, True at targets; column 0 is never a target.

    Returns:
        (loss_sum, num_targets): float32 scalar in nats with its graph, and N.

    Raises:
        RequestError: nothing is a target, or the model is not causal.
    """
    predicts_BT = torch.zeros_like(mask_BT)
    predicts_BT[:, :-1] = mask_BT[:, 1:]
    targets_N = ids_BT[:, 1:][mask_BT[:, 1:]]
    if not len(targets_N):
        raise RequestError("no token of this batch is a target, so there is nothing to score.")
    facts = read_head_facts(model)
    if not facts.is_causal:
        raise RequestError(
            f"{type(model).__name__} sees the tokens after the one that it predicts, so a loss "
            "over tokens would mean nothing. Needed is a decoder, such as a Llama or Qwen; an "
            "encoder such as BERT can be trained with task: classify."
        )
    if not facts.is_plain:
        logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT.long(), use_cache=False)[0]
        loss = F.cross_entropy(logits_BTV[predicts_BT].float(), targets_N, reduction="sum")
        return loss, len(targets_N)
    hidden_BTD = backbone_of(model)(
        input_ids=ids_BT, attention_mask=attention_BT.long(), use_cache=False
    )[0]
    hidden_ND, head = hidden_BTD[predicts_BT], head_of(model)
    return score_hidden(hidden_ND, head, targets_N, soft_cap_of(model)), len(targets_N)


def score_pack(
    model: nn.Module, ids_T: Tensor, positions_T: Tensor, mask_T: Tensor, bounds: tuple[int, ...]
) -> tuple[Tensor, int]:
    """The summed loss over the targets of documents that lie end to end, and their number.

    Args:
        positions_T: int64, from 0 in each document.
        bounds: where documents begin and end; see ``base.records.Pack``.

    Returns:
        as ``score_targets``; the model must be packable (``models.packed``).
    """
    predicts_T = torch.zeros_like(mask_T)
    predicts_T[:-1] = mask_T[1:]
    targets_N = ids_T[mask_T]
    row = {
        "input_ids": ids_T[None],
        "position_ids": positions_T[None] + read_pack_facts(model).first_position,
        "use_cache": False,
    }
    if not read_head_facts(model).is_plain:
        with packed(model, bounds):
            logits_TV = model(**row)[0][0]
        loss = F.cross_entropy(logits_TV[predicts_T].float(), targets_N, reduction="sum")
        return loss, len(targets_N)
    with packed(model, bounds):
        hidden_ND = backbone_of(model)(**row)[0][0][predicts_T]
    return score_hidden(hidden_ND, head_of(model), targets_N, soft_cap_of(model)), len(targets_N)


def score_pack_labels(
    model: nn.Module, ids_T: Tensor, positions_T: Tensor, bounds: tuple[int, ...], labels_N: Tensor
) -> tuple[Tensor, int, Tensor]:
    """The summed classification loss over documents that lie end to end.

    Returns:
        as ``score_labels``; the model must be row-packable (``models.packed``).
    """
    first = read_pack_facts(model).first_position
    with packed(model, bounds), first_tokens_only(model, bounds):
        logits_NC = model(input_ids=ids_T[None], position_ids=positions_T[None] + first)[0].float()
    return F.cross_entropy(logits_NC, labels_N, reduction="sum"), len(labels_N), logits_NC


def score_labels(
    model: nn.Module, ids_BT: Tensor, attention_BT: Tensor, labels_B: Tensor
) -> tuple[Tensor, int, Tensor]:
    """The summed classification loss over rows, their number, and the logits.

    Returns:
        (loss_sum, B, logits_BC): float32.
    """
    logits_BC = model(input_ids=ids_BT, attention_mask=attention_BT.long())[0].float()
    return F.cross_entropy(logits_BC, labels_B, reduction="sum"), len(labels_B), logits_BC


def score_hidden(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, soft_cap: float | None = None
) -> Tensor:
    """The summed loss of hidden states through an output head, chunk by chunk.

    Args:
        hidden_ND: states at the positions that predict targets.
        head: a plain linear layer takes the fast path; any other module, such as an
            adapted head, is called chunk by chunk and called again in the backward pass.
        soft_cap: c of z -> c tanh(z / c), or None.

    Returns:
        float32 scalar with its graph.

    Cost: one chunk of logits, at most ``CHUNK_LOGITS`` numbers, one [N, D] gradient, and
    for a trained head one [V, D] gradient.
    """
    if type(head) in (nn.Linear, NarrowHead) and is_frozen(hidden_ND, head, soft_cap):
        wants_gradient = torch.is_grad_enabled()
        weight_VD = head.codes if isinstance(head, NarrowHead) else head.weight
        return FrozenHead.apply(hidden_ND, weight_VD, head.bias, targets_N, wants_gradient)
    if type(head) is nn.Linear:
        ask = _Ask(targets_N, soft_cap, torch.is_grad_enabled())
        return _LinearHead.apply(hidden_ND, head.weight, head.bias, ask)
    rows = _count_rows(head.weight)
    losses = [
        checkpoint(_reference_loss, head, hidden, targets, soft_cap, use_reentrant=False)
        for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    ]
    return torch.stack(losses).sum()


@dataclass(frozen=True, slots=True)
class _Ask:
    """What a fused head needs besides tensors with gradients."""

    targets_N: Tensor
    soft_cap: float | None
    wants_gradient: bool


class _LinearHead(torch.autograd.Function):
    """Loss through a linear head; every gradient is ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ask: _Ask
    ) -> Tensor:
        wanted = [ask.wants_gradient and needed for needed in ctx.needs_input_grad[:3]]
        inputs = (hidden_ND, weight_VD, bias_V)
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if is_wanted else None
            for tensor, is_wanted in zip(inputs, wanted, strict=True)
        ]
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        rows = _count_rows(weight_VD)
        for start in range(0, len(hidden_ND), rows):
            piece = slice(start, start + rows)
            logits_NV = F.linear(hidden_ND[piece], weight_VD, bias_V)
            gpu = load_head(logits_NV)
            losses_N, p_NV = (gpu.cross_entropy if gpu else cross_entropy)(
                logits_NV, ask.targets_N[piece], ask.soft_cap, wants_gradient=any(wanted)
            )
            total += losses_N.sum()
            if p_NV is not None:
                _add_gradients(gradients, p_NV, inputs, piece)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *(
            (gradient * d_loss).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ), None


def _add_gradients(
    gradients: list[Tensor | None], p_NV: Tensor, inputs: tuple[Any, ...], piece: slice
) -> None:
    """A chunk's part: dh = p W, dW = p^T h, db = sum of p, with p = softmax - onehot."""
    hidden_ND, weight_VD, _ = inputs
    d_hidden_ND, d_weight_VD, d_bias_V = gradients
    narrow_NV = p_NV.to(weight_VD.dtype)
    if d_hidden_ND is not None:
        d_hidden_ND[piece] = narrow_NV @ weight_VD
    if d_weight_VD is not None:
        if narrow_NV.dtype == torch.float32:
            d_weight_VD.addmm_(narrow_NV.T, hidden_ND[piece])
        else:
            d_weight_VD += sum_products(narrow_NV.T, hidden_ND[piece], torch.float32)
    if d_bias_V is not None:
        d_bias_V += p_NV.sum(0, dtype=torch.float32)


def _reference_loss(
    head: nn.Module, hidden_ND: Tensor, targets_N: Tensor, soft_cap: float | None
) -> Tensor:
    """The readable reference of a chunk; autograd does the rest."""
    return F.cross_entropy(bend(head(hidden_ND).float(), soft_cap), targets_N, reduction="sum")


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, soft_cap: float | None, *, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses of rows of logits, float32 [N], and their gradient to the logits.

        z = c tanh(l / c)  (or l)        loss = log sum_j e^z_j - z_t
        dl = (e^(z - lse) - [j = t]) (1 - (z / c)^2)

    Args:
        logits_NV: overwritten, where it is float32.

    Returns:
        the gradient is float32 [N, V], or None when it is not wanted.
    """
    z_NV, slope_NV = logits_NV.float(), None
    if soft_cap:
        bent_NV = torch.tanh(z_NV / soft_cap)
        z_NV, slope_NV = bent_NV * soft_cap, 1 - bent_NV.square()
    targets_N1 = targets_N[:, None]
    lse_N1 = z_NV.logsumexp(-1, keepdim=True)
    losses_N = (lse_N1 - z_NV.gather(1, targets_N1))[:, 0]
    if not wants_gradient:
        return losses_N, None
    p_NV = z_NV.sub_(lse_N1).exp_()
    p_NV.scatter_add_(1, targets_N1, p_NV.new_full((), -1).expand_as(targets_N1))
    return losses_N, p_NV if slope_NV is None else p_NV.mul_(slope_NV)


def _count_rows(weight_VD: Tensor) -> int:
    """Rows of a chunk: enough to keep the device's matmul busy, few enough for its memory."""
    limit = GPU_CHUNK_LOGITS if weight_VD.is_cuda else CHUNK_LOGITS
    return max(16, limit // weight_VD.shape[0])
