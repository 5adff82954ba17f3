"""From a sample to token ids and a mask of what is trained.

The tokenizer's own chat template is the only template.  Which tokens are trained
is read off the rendered text, never off token ids, so it does not matter whether
the end-of-turn token is also the padding token:

    1. render the conversation:                 F
    2. render it with each assistant text replaced by a marker that occurs nowhere:
                                                p0 [marker 1] p1 [marker 2] p2
    3. then F = p0 text1 p1 text2 p2, so the place of each text in F is known;
       the end-of-turn token is what p1 and p2 begin with, and it is trained too.

A template that rewrites assistant texts breaks step 3, and that is an error with a
reason, as a wrong mask would train the wrong tokens without a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lorakeet.base.errors import DataError, RowError
from lorakeet.base.records import (
    Conversation,
    EncodedSample,
    LabelledText,
    Passage,
    Sample,
    Turn,
)

Span = tuple[int, int]
_MARKER = "\u2402lorakeet{}\u2403"
_TAG = re.compile(r"<\|?[^<>|\s]{1,40}\|?>|\[/?[A-Z_]{2,20}\]")


class Tokenizer(Protocol):
    """What encoding needs of transformers' fast tokenizers."""

    chat_template: Any
    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    all_special_tokens: list[str]

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """The conversation as text (or ids)."""

    def __call__(self, text: str, *more: Any, **options: Any) -> Any:
        """Ids and, on request, the character offsets of each token."""


def encode_sample(
    sample: Sample,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    too_long: str = "drop",
    label_names: Sequence[str] = (),
) -> EncodedSample:
    """Token ids of a sample and which of them are trained.

    Args:
        max_tokens: the window.
        too_long: ``drop`` refuses a longer sample, ``cut`` keeps its beginning.
        label_names: the classes, in the order of their indices.

    Raises:
        RowError: too long, nothing trained, an unknown label, two BOS tokens, or a
            template that refuses or rewrites the conversation.
        DataError: the tokenizer has no chat template and the sample is a conversation.

    Guarantees:
        ``mask[0]`` is False; a language-model sample has at least one True.
    """
    if isinstance(sample, LabelledText):
        return _encode_labelled(sample, tokenizer, max_tokens, too_long, label_names)
    if isinstance(sample, Passage):
        ids, mask = _encode_passage(sample, tokenizer)
    else:
        ids, mask = _encode_conversation(sample, tokenizer)
    _check_bos(ids, tokenizer)
    mask[:1] = False
    ids, mask = _fit(ids, mask, max_tokens, too_long)
    if not mask.any():
        raise RowError(
            "no token of this sample would be trained; it needs an assistant turn with text "
            "inside the window.",
            code="no-trained-token",
        )
    return EncodedSample(ids=ids, mask=mask, origin=sample.origin)


def render(turns: Sequence[Turn], tokenizer: Tokenizer, *, ask: bool = False) -> str:
    """A conversation as the text that the model sees.

    Args:
        ask: end with the header of an assistant turn, for generation.

    Raises:
        DataError: there is no chat template.
        RowError: the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so a conversation cannot be rendered. Take an "
            "instruct model as base, or set task: text to train on plain text."
        )
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except template_failures() as error:
        raise RowError(
            f"the chat template refuses this conversation: {error}.", code="template"
        ) from error


def template_failures() -> tuple[type[Exception], ...]:
    """What a template can end with: its own refusals, a sandbox's, and plain mistakes in it.

    transformers renders templates in jinja2's immutable sandbox, where Python's inner
    attributes cannot be reached and nothing that is passed in can be changed.
    """
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
            RecursionError)  # fmt: skip


def find_trained_spans(turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    """The rendered text and the character spans of all assistant texts with their end tokens.

    Raises:
        RowError: the template does not keep the assistant texts as they are.
    """
    text = render(turns, tokenizer)
    marked = [
        Turn(role=turn.role, content=_MARKER.format(number)) if turn.role == "assistant" else turn
        for number, turn in enumerate(turns)
    ]
    rest = render(marked, tokenizer)
    position, spans = 0, []
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before, marker, rest = rest.partition(_MARKER.format(number))
        start = position + len(before)
        said = _said_at(text, start, turn.content)
        if not marker or text[position:start] != before or said is None:
            raise _rewritten(number)
        end_token = _end_token(rest, tokenizer)
        position = start + len(said)
        spans.append((start, position + len(end_token)))
    if text[position:] != rest:
        raise _rewritten(len(turns) - 1)
    return text, spans


def explain(encoded: EncodedSample, tokenizer: Any) -> list[tuple[str, bool]]:
    """Runs of text that are trained or not, in order; their texts joined are the sample.

    Neighbours of one kind are decoded together, so that a character of several
    tokens stays whole.
    """
    runs: list[tuple[str, bool]] = []
    edges = np.flatnonzero(np.diff(encoded.mask.astype(np.int8))) + 1
    for ids, is_trained in zip(
        np.split(encoded.ids, edges), np.split(encoded.mask, edges), strict=True
    ):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        runs.append((text, bool(is_trained[0])))
    return runs


def _encode_conversation(
    sample: Conversation, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the rendered text; a token is trained when it overlaps a trained span."""
    text, spans = find_trained_spans(sample.turns, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoding["input_ids"], dtype=np.int32)
    offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    mask = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return ids, mask


def _encode_passage(sample: Passage, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """BOS where the tokenizer puts one, the text, EOS; all trained."""
    ids = list(tokenizer(sample.text)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None and (not ids or ids[-1] != eos):
        ids.append(eos)
    return np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)


def _encode_labelled(
    sample: LabelledText,
    tokenizer: Tokenizer,
    max_tokens: int,
    too_long: str,
    label_names: Sequence[str],
) -> EncodedSample:
    """Ids with the encoder's special tokens, and the index of the label."""
    if sample.label not in label_names:
        raise RowError(
            f"the label '{sample.label}' is none of {', '.join(label_names)}.", code="label"
        )
    ids = np.asarray(tokenizer(sample.text, sample.second_text)["input_ids"], dtype=np.int32)
    if len(ids) > max_tokens and too_long == "cut":
        ids = np.asarray(
            tokenizer(
                sample.text, sample.second_text, truncation="longest_first", max_length=max_tokens
            )["input_ids"],
            dtype=np.int32,
        )
    ids, mask = _fit(ids, np.zeros(len(ids), dtype=bool), max_tokens, too_long)
    return EncodedSample(
        ids=ids, mask=mask, origin=sample.origin, label=list(label_names).index(sample.label)
    )


def _fit(
    ids: np.ndarray, mask: np.ndarray, max_tokens: int, too_long: str
) -> tuple[np.ndarray, np.ndarray]:
    """The sample inside the window, or the refusal of one that is longer."""
    if len(ids) > max_tokens and too_long == "drop":
        raise RowError(
            f"{len(ids)} tokens, and the window data.max_tokens is {max_tokens}.", code="too-long"
        )
    return ids[:max_tokens], mask[:max_tokens]


def _check_bos(ids: np.ndarray, tokenizer: Tokenizer) -> None:
    """Two BOS tokens in a row at the head are a template's or a tokenizer's mistake."""
    bos = tokenizer.bos_token_id
    if bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos:
        raise RowError(
            "two BOS tokens stand at the head, one of the template and one of the row.",
            code="two-bos",
        )


def _said_at(text: str, start: int, content: str) -> str | None:
    """What stands for an assistant text at a place: the text itself, or the text trimmed."""
    forms = (content, content.strip(), content.lstrip(), content.rstrip())
    return next((form for form in forms if text.startswith(form, start)), None)


def _end_token(rest: str, tokenizer: Tokenizer) -> str:
    """The end-of-turn token that follows an assistant text, or nothing."""
    known = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    found = next((token for token in known if rest.startswith(token)), None)
    if found is None and (match := _TAG.match(rest)):
        found = match.group()
    return found or ""


def _rewritten(number: int) -> RowError:
    return RowError(
        f"the chat template rewrites the assistant text of turn {number + 1} (thinking tags, for "
        "example), so the trained tokens cannot be placed.",
        code="template-rewrites",
    )
