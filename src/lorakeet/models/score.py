"""Masked token log-likelihood as (sum, count), never the whole logits.

    loss_sum = - sum over targets t of log p(x_t | x_<t)

Only positions that predict a target pass the output head, in chunks of rows, and
the gradient to the hidden state is formed in the forward pass:

    dh = (softmax(h W^T) - onehot) W

so that a chunk's logits live for a moment and a backward pass through the head
costs no second matmul.  The caller divides once, by the step's count: this is why
1 x 8, 2 x 4 and 8 x 1 micro-batches give the same gradient.

Legend: B rows, T tokens, N targets, D hidden, V vocabulary, C classes.
Source: the chunked head is the idea of arXiv:2410.10989 (fused linear cross-entropy).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorakeet.base.errors import RequestError

CHUNK_LOGITS = 4_000_000


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
        RequestError: nothing is a target.
    """
    predicts_BT = torch.zeros_like(mask_BT)
    predicts_BT[:, :-1] = mask_BT[:, 1:]
    targets_N = ids_BT[:, 1:][mask_BT[:, 1:]]
    if not len(targets_N):
        raise RequestError("no token of this batch is a target, so there is nothing to score.")
    head = find_plain_head(model)
    if head is None:
        logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT.long(), use_cache=False)[0]
        loss = F.cross_entropy(logits_BTV[predicts_BT].float(), targets_N, reduction="sum")
        return loss, len(targets_N)
    hidden_BTD = backbone_of(model)(
        input_ids=ids_BT, attention_mask=attention_BT.long(), use_cache=False
    )[0]
    weight, bias = head.weight, getattr(head, "bias", None)
    loss = score_hidden(hidden_BTD[predicts_BT], weight, bias, targets_N, to_shape_of(model))
    return loss, len(targets_N)


def score_labels(
    model: nn.Module, ids_BT: Tensor, attention_BT: Tensor, labels_B: Tensor
) -> tuple[Tensor, int, Tensor]:
    """The summed classification loss over rows, their number, and the logits.

    Returns:
        (loss_sum, B, logits_BC): float32.
    """
    logits_BC = model(input_ids=ids_BT, attention_mask=attention_BT.long())[0].float()
    return F.cross_entropy(logits_BC, labels_B, reduction="sum"), len(labels_B), logits_BC


def find_plain_head(model: nn.Module) -> Any:
    """The output head when logits are known to be ``shape(hidden @ W^T + b)``, else None."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = model.config
    scales = ("logit_scale", "logits_scaling", "lm_head_multiplier", "mup_width_multiplier")
    is_scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in scales)
    backbone = backbone_of(model)
    is_plain = type(head) is nn.Linear and not is_scaled and backbone is not model
    return head if is_plain else None


def backbone_of(model: nn.Module) -> nn.Module:
    """The model without its output head."""
    return getattr(model, getattr(model, "base_model_prefix", "") or "", model)


def to_shape_of(model: nn.Module) -> float | None:
    """Gemma 2's soft cap c of the final logits, z -> c tanh(z / c), or None."""
    return getattr(model.config, "final_logit_softcapping", None)


def score_hidden(
    hidden_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets_N: Tensor,
    soft_cap: float | None = None,
) -> Tensor:
    """The summed loss of hidden states through an output head, chunk by chunk.

    Args:
        hidden_ND: states at the positions that predict targets.
        weight: [V, D]; its gradient is formed only when it is trained.
        soft_cap: c of z -> c tanh(z / c), or None.

    Returns:
        float32 scalar with its graph.

    Cost: one chunk of logits, at most ``CHUNK_LOGITS`` numbers, and one [N, D] gradient.
    """
    is_head_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not is_head_trained:
        return _FrozenHead.apply(hidden_ND, weight, bias, targets_N, soft_cap)
    rows = _rows_per_chunk(weight)
    losses = [
        checkpoint(_plain_loss, hidden, weight, bias, targets, soft_cap, use_reentrant=False)
        for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    ]
    return torch.stack(losses).sum()


class _FrozenHead(torch.autograd.Function):
    """Loss through a frozen head; the gradient to the hidden state is ready after forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets_N: Tensor,
        soft_cap: float | None,
    ) -> Tensor:
        needs_gradient = hidden_ND.requires_grad
        gradient_ND = torch.empty_like(hidden_ND) if needs_gradient else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        rows = _rows_per_chunk(weight)
        for start in range(0, len(hidden_ND), rows):
            piece = slice(start, start + rows)
            logits_NV, slope_NV = _logits(hidden_ND[piece], weight, bias, soft_cap)
            targets = targets_N[piece]
            normaliser_N = logits_NV.logsumexp(-1)
            picked_N = logits_NV.gather(1, targets[:, None])[:, 0]
            total += (normaliser_N - picked_N).sum()
            if gradient_ND is not None:
                p_NV = logits_NV.sub_(normaliser_N[:, None]).exp_()
                p_NV[torch.arange(len(targets), device=p_NV.device), targets] -= 1
                if slope_NV is not None:
                    p_NV *= slope_NV
                gradient_ND[piece] = p_NV.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * d_loss.to(gradient_ND.dtype), None, None, None, None


def _plain_loss(
    hidden_ND: Tensor, weight: Tensor, bias: Tensor | None, targets_N: Tensor, cap: float | None
) -> Tensor:
    """The readable reference of a chunk; autograd does the rest."""
    logits_NV, _ = _logits(hidden_ND, weight, bias, cap)
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")


def _logits(
    hidden_ND: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None
) -> tuple[Tensor, Tensor | None]:
    """float32 logits and, under a soft cap, the slope 1 - tanh^2 of the cap."""
    logits_NV = F.linear(hidden_ND, weight, bias).float()
    if not cap:
        return logits_NV, None
    bent_NV = torch.tanh(logits_NV / cap)
    return bent_NV * cap, 1 - bent_NV.square()


def _rows_per_chunk(weight: Tensor) -> int:
    return max(16, CHUNK_LOGITS // weight.shape[0])
