"""Attention of a pack: each segment of a row sees itself and the segments it goes on from.

    out_s = softmax(q_s [k_ancestors k_s]^T / sqrt(D)) [v_ancestors v_s]

A whole sample is a segment without ancestors; a shared opening is the ancestor of what
follows it in each sample, so its keys and values are computed once and their gradients
add up over all the samples.

Legend: T tokens of the row, H heads, D width of a head, R tokens of a segment, P tokens
of its ancestors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the segments of a row lie.

    Args:
        segments: for each segment the spans of its ancestors in their order, then its own.
    """

    segments: tuple[tuple[Span, ...], ...]

    @classmethod
    def build(cls, bounds: tuple[int, ...], parents: tuple[int, ...] = ()) -> Layout:
        """The layout of a pack; see ``base.records.Pack`` for both arguments."""
        segments: list[tuple[Span, ...]] = []
        for number, span in enumerate(zip(bounds, bounds[1:], strict=False)):
            parent = parents[number] if parents else -1
            segments.append((*(segments[parent] if parent >= 0 else ()), span))
        return cls(segments=tuple(segments))


@dataclass(frozen=True, kw_only=True)
class How:
    """What a layer asks of its attention.

    Args:
        dropout: of the attention weights.
        scaling: of the scores; None is 1 / sqrt(D).
        window: tokens that a token sees, itself included; None sees all.
        soft_cap: Gemma 2's c of z -> c tanh(z / c), before the softmax.
    """

    is_causal: bool
    dropout: float = 0.0
    scaling: float | None = None
    window: int | None = None
    soft_cap: float | None = None


def attend_segments(q: Tensor, k: Tensor, v: Tensor, layout: Layout, how: How) -> Tensor:
    """Attention of a row, segment by segment.

    Args:
        q: [1, H, T, D]; k and v may have fewer heads.

    Returns:
        [1, H, T, D].
    """
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    parts = [
        _attend(
            q[:, :, slice(*spans[-1])], *(_gather(x, spans) for x in (k, v)), how
        )
        for spans in layout.segments
    ]  # fmt: skip
    return torch.cat(parts, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """Queries [1, H, R, D] over keys [1, H, P + R, D], the queries standing at the end."""
    length, all_tokens = q.shape[2], k.shape[2]
    is_windowed = how.window is not None and all_tokens > how.window
    if how.soft_cap is not None:
        return _attend_with_cap(q, k, v, how)
    needs_mask = is_windowed or (how.is_causal and all_tokens > length)
    mask = _mask(length, all_tokens, how).to(q.device) if needs_mask else None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=how.dropout, scale=how.scaling,
        is_causal=how.is_causal and mask is None and length > 1,
    )  # fmt: skip


def _gather(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """The tokens of some spans in a row."""
    parts = [x[:, :, start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Key-value heads repeated for the query heads that share them."""
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _mask(length: int, all_tokens: int, how: How) -> Tensor:
    """Bool [R, P + R], True where a query (row) sees a key (column)."""
    place = torch.arange(all_tokens)
    distance = place[all_tokens - length :, None] - place[None, :]
    seen = distance >= 0 if how.is_causal else torch.ones_like(distance, dtype=torch.bool)
    return seen & (distance.abs() < how.window) if how.window is not None else seen


def _attend_with_cap(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """Gemma 2's attention, z -> c tanh(z / c) before the softmax."""
    scale = how.scaling if how.scaling is not None else q.shape[-1] ** -0.5
    scores = how.soft_cap * torch.tanh(q @ k.transpose(-1, -2) * scale / how.soft_cap)
    mask = _mask(q.shape[2], k.shape[2], how).to(q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores.float(), -1).to(q.dtype) @ v
