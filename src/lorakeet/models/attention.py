"""Attention of a pack: each segment of a row sees itself and the segments it goes on from.

    out_s = softmax(q_s [k_ancestors k_s]^T / sqrt(D)) [v_ancestors v_s]

A whole sample is a segment without ancestors; a shared opening is the ancestor of what
follows it in each sample, so its keys and values are computed once and their gradients
add up over all the samples.

Two ways, which a test compares.  The readable one gives each segment its own call over the
keys that it sees.  The fast one (float32 on a CPU) takes an opening once for all that
follow it, and joins the parts of a softmax by their log-sum-exp L:

    L = log(e^L1 + e^L2),   out = e^(L1 - L) out1 + e^(L2 - L) out2

Its backward passes the joined L and out to each part, which gives each its exact share of
the gradient (arXiv:2307.08691 section 3.1, equations of the backward pass).  Only q, k, v,
out and L are kept, and keys are never copied.

Legend: T tokens of the row, H heads, D width of a head, R tokens of a segment, P tokens
of its ancestors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorakeet.models.units import Dropout, draws_fast

Span = tuple[int, int]
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the segments of a row lie.

    Args:
        segments: for each segment the spans of its ancestors in their order, then its own.
        openings: each segment that others go on from, with the span of all these, which
            follow it directly.
    """

    segments: tuple[tuple[Span, ...], ...]
    openings: tuple[tuple[Span, Span], ...] = ()

    @classmethod
    def build(cls, bounds: tuple[int, ...], parents: tuple[int, ...] = ()) -> Layout:
        """The layout of a pack; see ``base.records.Pack`` for both arguments."""
        segments: list[tuple[Span, ...]] = []
        for number, span in enumerate(zip(bounds, bounds[1:], strict=False)):
            parent = parents[number] if parents else -1
            segments.append((*(segments[parent] if parent >= 0 else ()), span))
        reach: dict[Span, int] = {}
        for *ancestors, (_, end) in segments:
            reach.update(dict.fromkeys(ancestors, end))
        openings = tuple((span, (span[1], end)) for span, end in reach.items())
        return cls(segments=tuple(segments), openings=openings)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(sum(end - start for start, end in spans) for spans in self.segments)


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
    if _is_fast(q, v, layout, how):
        return _JoinedAttention.apply(q, k, v, layout, how)
    return attend_apart(q, k, v, layout, how)


def attend_apart(q: Tensor, k: Tensor, v: Tensor, layout: Layout, how: How) -> Tensor:
    """The readable way of ``attend_segments``, on any device and dtype."""
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    keys, values = (_split(x, layout) for x in (k, v))
    queries = q.split([end - start for *_, (start, end) in layout.segments], dim=2)
    parts = [_attend(*each, how) for each in zip(queries, keys, values, strict=True)]
    return torch.cat(parts, dim=2)


def attend_first(q: Tensor, k: Tensor, v: Tensor, layout: Layout, how: How) -> Tensor:
    """Attention of the first token of each document alone, over its whole document.

    Args:
        layout: of documents without ancestors.
        how: neither causal nor in a window.

    Returns:
        [1, H, T, D], zero at all other tokens.
    """
    starts = torch.tensor([start for ((start, _),) in layout.segments], device=q.device)
    k, v = (_split(_repeat(x, q.shape[1]), layout) for x in (k, v))
    first = q.index_select(2, starts).split(1, dim=2)
    parts = [_attend(*each, how) for each in zip(first, k, v, strict=True)]
    return torch.zeros_like(q).index_copy(2, starts, torch.cat(parts, dim=2))


def _attend(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """Queries [1, H, R, D] over keys [1, H, P + R, D], the queries standing at the end."""
    length, all_tokens = q.shape[2], k.shape[2]
    is_windowed = how.window is not None and all_tokens > how.window
    if how.soft_cap is not None:
        return _attend_with_cap(q, k, v, how)
    needs_mask = is_windowed or (how.is_causal and all_tokens > length)
    if how.dropout and q.dtype == torch.float32 and draws_fast(q):
        return _attend_with_dropout(q, k, v, how)
    mask = _mask(length, all_tokens, how, q.device) if needs_mask else None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=how.dropout, scale=how.scaling,
        is_causal=how.is_causal and mask is None and length > 1,
    )  # fmt: skip


def _split(x: Tensor, layout: Layout) -> Sequence[Tensor]:
    """The tokens that each segment sees: its ancestors' and its own.

    Segments without ancestors come from one cut, whose gradient is one row again; single
    slices would each have a gradient of the row's size.
    """
    if all(len(spans) == 1 for spans in layout.segments):
        return x.split([end - start for ((start, end),) in layout.segments], dim=2)
    return [torch.cat([_at(x, span) for span in spans], dim=2) for spans in layout.segments]


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Key-value heads repeated for the query heads that share them."""
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _mask(length: int, all_tokens: int, how: How, device: torch.device) -> Tensor:
    """Bool [R, P + R], True where a query (row) sees a key (column)."""
    place = torch.arange(all_tokens, device=device)
    distance = place[all_tokens - length :, None] - place[None, :]
    seen = distance >= 0 if how.is_causal else torch.ones_like(distance, dtype=torch.bool)
    return seen & (distance.abs() < how.window) if how.window is not None else seen


def _attend_with_cap(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """Gemma 2's attention, z -> c tanh(z / c) before the softmax."""
    scale = how.scaling if how.scaling is not None else q.shape[-1] ** -0.5
    scores = how.soft_cap * torch.tanh(q @ k.transpose(-1, -2) * scale / how.soft_cap)
    mask = _mask(q.shape[2], k.shape[2], how, q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores.float(), -1).to(q.dtype) @ v


def _attend_with_dropout(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """softmax(q k^T / sqrt(D)) with weights dropped, then v."""
    scale = how.scaling if how.scaling is not None else q.shape[-1] ** -0.5
    scores = (q * scale) @ k.transpose(-1, -2)
    if how.is_causal or how.window is not None:
        mask = _mask(q.shape[2], k.shape[2], how, q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
    return Dropout.apply(torch.softmax(scores, -1), how.dropout) @ v


def _is_fast(q: Tensor, v: Tensor, layout: Layout, how: How) -> bool:
    """Whether the joined way computes what is asked."""
    is_usual = how.dropout == 0 and how.soft_cap is None and q.shape[-1] == v.shape[-1]
    sees_all = how.window is None or layout.longest <= how.window
    return is_usual and sees_all and q.device.type == "cpu" and q.dtype == torch.float32


class _JoinedAttention(torch.autograd.Function):
    """Attention of a row of segments by torch's flash kernel for CPUs, called part by part."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, how: How) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        for mine, theirs, is_causal in _parts(layout, how):
            part, part_lse = _FORWARD(
                _at(q, mine), *_keys(q, k, v, theirs), 0.0, is_causal, scale=how.scaling
            )
            if mine == theirs:
                _at(out, mine).copy_(part)
                _at(lse, mine).copy_(part_lse)
                continue
            joined = torch.logaddexp(_at(lse, mine), part_lse)
            _at(out, mine).lerp_(part, (part_lse - joined).exp_()[..., None])
            _at(lse, mine).copy_(joined)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.how = layout, how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for mine, theirs, is_causal in _parts(ctx.layout, ctx.how):
            part_dq, part_dk, part_dv = _BACKWARD(
                _at(d_out, mine), _at(q, mine), *_keys(q, k, v, theirs), _at(out, mine),
                _at(lse, mine), 0.0, is_causal, scale=ctx.how.scaling,
            )  # fmt: skip
            _at(dq, mine).add_(part_dq)
            _at(dk, theirs).add_(_unrepeat(part_dk, k.shape[1]))
            _at(dv, theirs).add_(_unrepeat(part_dv, v.shape[1]))
        return dq, dk, dv, None, None


def _parts(layout: Layout, how: How) -> Iterator[tuple[Span, Span, bool]]:
    """Queries, keys, and whether each query sees only the keys up to itself."""
    for *_, span in layout.segments:
        yield span, span, how.is_causal
    for opening, followers in layout.openings:
        yield followers, opening, False


def _at(x: Tensor, span: Span) -> Tensor:
    """The tokens of a span, a view."""
    return x[:, :, span[0] : span[1]]


def _keys(q: Tensor, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """Keys and values of a span for every head of the queries."""
    return _repeat(_at(k, span), q.shape[1]), _repeat(_at(v, span), q.shape[1])


def _unrepeat(x: Tensor, heads: int) -> Tensor:
    """The sum over the query heads that share a key-value head."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)
