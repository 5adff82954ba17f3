"""A conversation as the text that the model sees, and which of its characters are trained.

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

from lorakeet.base.errors import DataError, RowError
from lorakeet.base.records import Turn

Span = tuple[int, int]
MAX_FRAMES = 1000
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

    def __call__(self, text: str | list[str], *more: Any, **options: Any) -> Any:
        """Ids and, on request, the character offsets of each token; of one text or of each."""


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
            "instruct model as base, set data.chat_template: plain, or set task: text to train on "
            "plain text."
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


def render_all(
    conversations: Sequence[Sequence[Turn]], tokenizer: Tokenizer
) -> list[str | RowError]:
    """Each conversation as ``render`` gives it, or its refusal; in one call where none is.

    Raises:
        DataError: there is no chat template.
    """
    if not conversations or not tokenizer.chat_template:
        return [render(turns, tokenizer) for turns in conversations]
    told = [[{"role": t.role, "content": t.content} for t in turns] for turns in conversations]
    try:
        return tokenizer.apply_chat_template(told, tokenize=False)
    except template_failures():
        return [_render_or_refuse(turns, tokenizer) for turns in conversations]


def _render_or_refuse(turns: Sequence[Turn], tokenizer: Tokenizer) -> str | RowError:
    try:
        return render(turns, tokenizer)
    except RowError as error:
        return error


class Frames:
    """What a template puts around the texts of a conversation, by its roles.

    A rendered conversation that is its frame filled with its texts needs no second
    rendering to tell where they stand.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._found: dict[tuple[str, ...], list[str] | None] = {}

    def find_spans(self, text: str, turns: Sequence[Turn]) -> list[Span] | None:
        """The trained characters of a rendered conversation; None where the frame does not fit."""
        roles = tuple([turn.role for turn in turns])
        if roles not in self._found:
            if len(self._found) == MAX_FRAMES:
                return None
            self._found[roles] = self._find(turns)
        frame = self._found[roles]
        if frame is None or not text.startswith(frame[0]):
            return None
        position, spans = len(frame[0]), []
        for turn, after in zip(turns, frame[1:], strict=True):
            said = _said_at(text, position, turn.content)
            if said is None or not text.startswith(after, position + len(said)):
                return None
            end = position + len(said)
            if turn.role == "assistant":
                if not after and end < len(text):
                    return None  # what ends the turn would be the next text
                spans.append((position, end + len(_end_token(after, self._tokenizer))))
            position = end + len(after)
        return spans if position == len(text) else None

    def _find(self, turns: Sequence[Turn]) -> list[str] | None:
        """The rendering of marked texts, cut at the marks; None unless each stands there once."""
        marks = [_MARKER.format(number) for number in range(len(turns))]
        marked = [
            Turn(role=turn.role, content=mark) for turn, mark in zip(turns, marks, strict=True)
        ]
        rest = _render_or_refuse(marked, self._tokenizer)
        frame = []
        for mark in marks:
            if isinstance(rest, RowError) or rest.count(mark) != 1:
                return None
            before, _, rest = rest.partition(mark)
            frame.append(before)
        return [*frame, rest] if isinstance(rest, str) else None


def find_trained_spans(turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    """The rendered text and the character spans of all assistant texts with their end tokens.

    Raises:
        RowError: the template does not keep the assistant texts as they are.
    """
    text = render(turns, tokenizer)
    return text, find_spans_of(text, turns, tokenizer)


def find_spans_of(text: str, turns: Sequence[Turn], tokenizer: Tokenizer) -> list[Span]:
    """As ``find_trained_spans``, of a conversation that was rendered already."""
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
    return spans


def _said_at(text: str, start: int, content: str) -> str | None:
    """What stands for an assistant text at a place: the text itself, or the text trimmed."""
    forms = (content, content.strip(), content.lstrip(), content.rstrip())
    return next((form for form in forms if text.startswith(form, start)), None)


def _end_token(rest: str, tokenizer: Tokenizer) -> str:
    """The end-of-turn token that follows an assistant text, or nothing."""
    found = [token for token in tokenizer.all_special_tokens if token and rest.startswith(token)]
    if not found and (match := _TAG.match(rest)):
        found = [match.group()]
    return max(found, key=len, default="")


def _rewritten(number: int) -> RowError:
    return RowError(
        f"the chat template rewrites the assistant text of turn {number + 1} (thinking tags, for "
        "example), so the trained tokens cannot be placed.",
        code="template-rewrites",
    )
