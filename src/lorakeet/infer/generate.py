"""Batched generation: greedy or drawn, streamed, stopped at tokens or strings, cancelled.

    read all prompts -> draw a token a row -> rows that have ended leave -> one step -> draw ...

``infer.decoder`` runs the model, ``infer.draw`` chooses, ``infer.text_stream``
turns tokens into text; this file decides when a row has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lorakeet.base.errors import RequestError
from lorakeet.base.records import Completion
from lorakeet.infer.decoder import Decoder
from lorakeet.infer.draw import draw_tokens
from lorakeet.infer.mode import evaluation_mode
from lorakeet.infer.prompts import encode_prompt, stop_token_ids
from lorakeet.infer.sampling import SamplingSettings
from lorakeet.infer.text_stream import TextStream

__all__ = ["encode_prompt", "generate", "read_window", "stop_token_ids"]

OnText = Callable[[int, str], None]
Cancelled = Callable[[], bool | Collection[int]]
NO_WINDOW = 2**31


@dataclass(kw_only=True)
class Row:
    """One answer while it is written.

    Args:
        index: place in the caller's list of prompts.
        limit: the most tokens it may have, from its settings and the window.
    """

    index: int
    prompt: list[int]
    settings: SamplingSettings
    stream: TextStream
    generator: torch.Generator
    limit: int
    ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "cancelled"] | None = None

    def to_completion(self) -> Completion:
        """The answer and its cost; the stop token is among the ids, not in the text."""
        return Completion(
            text=self.stream.text,
            num_prompt_tokens=len(self.prompt),
            num_completion_tokens=len(self.ids),
            finish_reason=self.finish_reason or "cancelled",
            token_ids=tuple(self.ids),
        )


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings],
    on_text: OnText | None = None,
    cancelled: Cancelled | None = None,
) -> list[Completion]:
    """One answer for each prompt, in their order, computed as one batch.

    Args:
        model: a causal language model of transformers; its training mode is kept.
        prompts: token ids, each at least one and fewer than the model's window.
        settings: for all rows, or one for each.
        on_text: called with the prompt's number and a new piece of its text; never
            half a character, never part of a stop string.
        cancelled: asked before each step; True ends all rows, a collection of
            prompt numbers ends those.

    Raises:
        RequestError: a prompt is empty, fills the window, or holds an unknown token.
        NumericsError: the model's logits are NaN.

    Guarantees:
        greedy tokens equal those of transformers' ``generate``; a row's tokens
        depend on its prompt and settings, not on its neighbours (to rounding).

    Cost: keys and values of the whole padded batch stay in memory; callers with
    many prompts give them in portions.
    """
    rows = _open_rows(model, tokenizer, prompts, settings)
    if rows:
        stop_ids = stop_token_ids(model, tokenizer)
        with evaluation_mode(model):
            _write_answers(Decoder(model), rows, stop_ids, on_text, cancelled)
    return [row.to_completion() for row in rows]


def read_window(model: Any) -> int:
    """The most tokens, prompt and answer together, that a model has positions for."""
    return int(getattr(model.config, "max_position_embeddings", None) or NO_WINDOW)


def _open_rows(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings],
) -> list[Row]:
    """A checked row for each prompt."""
    each = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else settings
    window = read_window(model)
    num_ids = model.get_input_embeddings().num_embeddings
    rows = []
    for index, (prompt, rules) in enumerate(zip(prompts, each, strict=True)):
        ids = [int(token) for token in prompt]
        _check_prompt(ids, window, num_ids)
        rows.append(
            Row(
                index=index,
                prompt=ids,
                settings=rules,
                stream=TextStream(tokenizer, rules.stop),
                generator=torch.Generator().manual_seed(rules.seed),
                limit=min(rules.max_new_tokens, window - len(ids)),
            )
        )
    return rows


def _check_prompt(ids: list[int], window: int, num_ids: int) -> None:
    """What a prompt must be.

    Raises:
        RequestError: it is not.
    """
    if not ids:
        raise RequestError("The prompt is empty. Give at least one token.")
    if len(ids) >= window:
        raise RequestError(
            f"The prompt has {len(ids)} tokens and the model's window is {window}, so no token is "
            "left for an answer. Shorten the prompt or choose a model with a longer window."
        )
    if max(ids) >= num_ids or min(ids) < 0:
        raise RequestError(
            f"The prompt holds token {max(ids)} and the model knows 0 to {num_ids - 1}. "
            "Encode it with the model's own tokenizer."
        )


def _write_answers(
    decoder: Decoder,
    rows: list[Row],
    stop_ids: frozenset[int],
    on_text: OnText | None,
    cancelled: Cancelled | None,
) -> None:
    """The loop: draw, take, drop what has ended, step."""
    _mark_cancelled(rows, cancelled)
    rows = [row for row in rows if not row.finish_reason]
    if not rows:
        return
    logits_BV = decoder.read_prompts([row.prompt for row in rows])
    while True:
        tokens = draw_tokens(
            logits_BV, [row.settings for row in rows], [row.generator for row in rows]
        )
        for row, token in zip(rows, tokens, strict=True):
            _take_token(row, token, stop_ids, on_text)
        _mark_cancelled(rows, cancelled)
        places = [place for place, row in enumerate(rows) if not row.finish_reason]
        if not places:
            return
        rows = [rows[place] for place in places]
        logits_BV = decoder.step([tokens[place] for place in places], places)


def _take_token(row: Row, token: int, stop_ids: frozenset[int], on_text: OnText | None) -> None:
    """Adds a token to an answer and says whether, and why, it has ended."""
    row.ids.append(token)
    piece = ""
    if token in stop_ids:
        row.finish_reason = "stop"
    else:
        piece = row.stream.push(token)
        if row.stream.is_stopped:
            row.finish_reason = "stop"
        elif len(row.ids) >= row.limit:
            row.finish_reason = "length"
    if row.finish_reason:
        piece += row.stream.flush()
    if row.stream.is_stopped:
        row.finish_reason = "stop"
    if piece and on_text:
        on_text(row.index, piece)


def _mark_cancelled(rows: list[Row], cancelled: Cancelled | None) -> None:
    """Ends the rows that nobody waits for."""
    asked = cancelled() if cancelled and any(not row.finish_reason for row in rows) else False
    for row in rows:
        is_wanted = asked is False or (asked is not True and row.index not in asked)
        if not is_wanted and not row.finish_reason:
            row.finish_reason = "cancelled"
