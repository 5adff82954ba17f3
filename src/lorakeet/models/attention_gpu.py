"""Attention of a pack on a GPU: all its segments in one call, where a package can do that.

    flash-varlen        flash_attn's varlen call: the segments' ends instead of a mask; ancestors'
                        keys are laid before a segment's own, as its causal mask ends at the right
    flex                torch's FlexAttention, which compiles this mask into its kernel:
                            i sees j   if  since_j <= i < until_j  (and j <= i when causal)
                        since_j is where j's segment begins and until_j where the last segment
                        ends that goes on from it; blocks of 128 x 128 without such a pair are
                        never computed
    sdpa-per-document   ``attention.attend_segments``, the reference

The two packages are proved on the device before they serve: an answer and its gradients on a
small pack must agree with the reference, or the reference computes and the reason is told.

Legend: T tokens of the row, H heads, D width of a head, S segments, N blocks of 128 tokens.
Source: FlashAttention-2, arXiv:2307.08691; FlexAttention, arXiv:2412.05496.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakeet.base.gpu_code import APART, FLASH, FLEX, AttentionChoice, choose_packed_attention
from lorakeet.models.attention import How, Layout, attend_apart
from lorakeet.quant.narrow import NarrowEmbedding

Attend = Callable[[Tensor, Tensor, Tensor, Layout, How], Tensor]
BLOCK = 128
FLASH_WIDTH = 256  # of a head, at most
PROOF = Layout.build((0, 40, 150, 190, 300), (-1, 0, 0, -1))
NEAR = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_FAILURES = (
    ImportError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError, OSError
)  # fmt: skip
_PROOFS: dict[tuple[Any, ...], str] = {}


def find_attention(q: Tensor, v: Tensor, how: How) -> Attend | None:
    """The proved call for a pack on a GPU; None where the reference computes."""
    if q.device.type != "cuda":
        return None
    way = choose_packed_attention(q.device.type, _name_of(q.dtype)).way
    if way == APART or q.shape[-1] != v.shape[-1] or not _can(way, q, how):
        return None
    key = (way, q.shape[1], v.shape[1], q.shape[-1], q.dtype, q.device, replace(how, dropout=0.0))
    if key not in _PROOFS:
        _PROOFS[key] = _prove(way, q, v.shape[1], key[-1])
    is_short = way == FLEX and q.shape[2] < BLOCK  # less than a block is not worth compiling
    return None if _PROOFS[key] or is_short else _WAYS[way]


def describe_attention(model: nn.Module) -> AttentionChoice:
    """How a model's packs are attended, after ``find_attention`` has been asked."""
    parameter = next(model.parameters())
    device = parameter.device.type
    choice = choose_packed_attention(device, _name_of(_dtype_of(model)))
    bad = next((why for (way, *_), why in _PROOFS.items() if way == choice.way and why), "")
    if not bad:
        return choice
    return AttentionChoice(
        way=APART,
        why=f"{choice.way} is here, but on this device it {bad}; each document has its own call.",
    )


def attend_flash(q: Tensor, k: Tensor, v: Tensor, layout: Layout, how: How) -> Tensor:
    """flash_attn's varlen call over the segments; as ``attention.attend_segments``."""
    from flash_attn import flash_attn_varlen_func

    keys = to_flash_keys(layout, q.device)
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (q, k, v))
    if layout.openings:
        k_THD, v_THD = (x.index_select(0, keys.places) for x in (k_THD, v_THD))
    side = -1 if how.window is None else how.window - 1
    out_THD = flash_attn_varlen_func(
        q_THD, k_THD, v_THD, keys.query_ends, keys.key_ends, keys.most_queries, keys.most_keys,
        dropout_p=how.dropout, softmax_scale=how.scaling, causal=how.is_causal,
        window_size=(side, 0 if how.is_causal else side), softcap=how.soft_cap or 0.0,
        deterministic=True,
    )  # fmt: skip
    return out_THD.transpose(0, 1)[None]


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, how: How, call: Any = None
) -> Tensor:
    """FlexAttention with the segments' mask; as ``attention.attend_segments``.

    Args:
        call: torch's flex_attention, compiled when absent: uncompiled it writes all scores.
    """
    return (call or _compile_flex())(
        q, k, v, block_mask=to_block_mask(layout, how, q.device),
        score_mod=_bend_by(how.soft_cap) if how.soft_cap else None,
        scale=how.scaling, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FlashKeys:
    """A layout as the varlen call wants it.

    Args:
        places: int64, the keys of all segments, ancestors first; a key may stand often.
        query_ends, key_ends: int32 [S + 1], from 0.
    """

    places: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int


@lru_cache(maxsize=4)
def to_flash_keys(layout: Layout, device: torch.device) -> FlashKeys:
    """Where each segment's queries and keys end; built once a pack."""
    queries = torch.tensor([spans[-1][1] - spans[-1][0] for spans in layout.segments])
    keys = torch.tensor([sum(end - start for start, end in s) for s in layout.segments])
    places = [torch.arange(*span) for spans in layout.segments for span in spans]
    ends = [F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32) for sizes in (queries, keys)]
    return FlashKeys(
        places=torch.cat(places).to(device), query_ends=ends[0].to(device),
        key_ends=ends[1].to(device), most_queries=int(queries.max()), most_keys=int(keys.max()),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TokenSight:
    """Which rows see each token: int32 [N * 128], on the CPU; places after T are seen by none.

    Args:
        since, until: the rows that see a token, before the causal mask.
        position: within the sample, ancestors counted.
    """

    since: Tensor
    until: Tensor
    position: Tensor


def to_token_sight(layout: Layout) -> TokenSight:
    """``since``, ``until`` and the position of each token of a row."""
    reach = {opening: followers[1] for opening, followers in layout.openings}
    num_tokens = layout.segments[-1][-1][1]
    size = -(-num_tokens // BLOCK) * BLOCK
    since, until, position = (torch.zeros(size, dtype=torch.int32) for _ in range(3))
    for *ancestors, (start, end) in layout.segments:
        since[start:end], until[start:end] = start, reach.get((start, end), end)
        before = sum(stop - first for first, stop in ancestors)
        position[start:end] = torch.arange(before, before + end - start)
    return TokenSight(since=since, until=until, position=position)


@lru_cache(maxsize=4)
def to_block_mask(layout: Layout, how: How, device: torch.device) -> Any:
    """FlexAttention's mask of a layout, without ever building T x T; built once a pack."""
    from torch.nn.attention.flex_attention import BlockMask

    sight, num_tokens = to_token_sight(layout), layout.segments[-1][-1][1]
    num_blocks = len(sight.since) // BLOCK
    first = torch.arange(num_blocks) * BLOCK
    since = sight.since.view(-1, BLOCK)
    # padding in the last block must not pretend that its keys are seen from row 0 on
    since = torch.where(sight.until.view(-1, BLOCK) > 0, since, num_tokens).amin(1)
    until = sight.until.view(-1, BLOCK).amax(1)
    meets_NN = (since[None] < first[:, None] + BLOCK) & (first[:, None] < until[None])
    if how.is_causal:
        meets_NN &= first[None] <= first[:, None]
    order_NN = torch.argsort(meets_NN.to(torch.int8), dim=1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        meets_NN.sum(1).to(torch.int32)[None, None].to(device),
        order_NN.to(torch.int32)[None, None].contiguous().to(device),
        BLOCK_SIZE=BLOCK, mask_mod=_sees(sight, how, device),
        seq_lengths=(num_tokens, num_tokens),
    )  # fmt: skip


def _sees(sight: TokenSight, how: How, device: torch.device) -> Callable[..., Tensor]:
    """Whether row i sees token j, as FlexAttention asks it."""
    since, until, position = (x.to(device) for x in (sight.since, sight.until, sight.position))
    is_causal, window = how.is_causal, how.window

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (since[j] <= i) & (i < until[j])
        if is_causal:
            seen = seen & (j <= i)
        if window is not None:
            seen = seen & ((position[i] - position[j]).abs() < window)
        return seen

    return sees


@cache
def _bend_by(soft_cap: float) -> Callable[..., Tensor]:
    """Gemma 2's c tanh(z / c) of a score; one function a cap, so that it compiles once."""

    def bend(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return soft_cap * torch.tanh(score / soft_cap)

    return bend


@cache
def _compile_flex() -> Any:
    """torch's flex_attention, compiled at its first call; other lengths make it dynamic."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _can(way: str, q: Tensor, how: How) -> bool:
    """Whether a way computes what is asked at all."""
    return q.shape[-1] <= FLASH_WIDTH if way == FLASH else how.dropout == 0


def _prove(way: str, q: Tensor, kv_heads: int, how: How) -> str:
    """Why a way may not serve, or nothing: its answer and gradients against the reference."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, heads = PROOF.segments[-1][-1][1], (q.shape[1], kv_heads, kv_heads, q.shape[1])
    try:
        with torch.inference_mode(False), torch.enable_grad():
            drawn = [torch.randn(1, h, num_tokens, q.shape[-1], generator=generator) for h in heads]
            given = [each.to(q.device, q.dtype) for each in drawn]
            expected, found = (_answer(a, given, how) for a in (attend_apart, _WAYS[way]))
    except _FAILURES as error:
        return f"fails ({str(error).strip().splitlines()[0] if str(error) else type(error)})"
    return "" if all(map(_is_near, found, expected)) else "answers otherwise than SDPA"


def _answer(attend: Attend, given: list[Tensor], how: How) -> list[Tensor]:
    """The answer and the gradients to q, k and v."""
    q, k, v = (x.detach().clone().requires_grad_() for x in given[:3])
    out = attend(q, k, v, PROOF, how)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3])]


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """Of one shape and equal up to the rounding of the dtype; a NaN is never near."""
    near = NEAR[expected.dtype] * float(expected.abs().max())
    return found.shape == expected.shape and float((found - expected).abs().max()) <= near


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that the model computes in: that of its embedding."""
    table = model.get_input_embeddings()
    return table.dtype if isinstance(table, NarrowEmbedding) else table.weight.dtype


def _name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


_WAYS: dict[str, Attend] = {FLASH: attend_flash, FLEX: attend_flex}
