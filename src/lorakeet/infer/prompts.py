"""Conversations as token ids, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakeet.base.errors import RequestError
from lorakeet.base.records import Turn
from lorakeet.data.render import template_failures

_PROBE = "kestrel"


def encode_prompt(tokenizer: Any, turns: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation, ready for the assistant's next turn.

    The chat template is rendered to text with its generation prompt and encoded
    without further special tokens, so that there is exactly the BOS that the
    template writes.  A tokenizer without a template gets the last user turn as
    plain text.

    Args:
        turns: at least one; usually ends with a user turn.

    Raises:
        RequestError: there is no turn, or the template refuses the conversation
            (a system turn that the model has no place for, two user turns in a row).
    """
    if not turns:
        raise RequestError("The conversation is empty. Give at least one user message.")
    if not getattr(tokenizer, "chat_template", None):
        asked = [turn for turn in turns if turn.role == "user"] or list(turns)
        return encode_plain(tokenizer, asked[-1].content)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except template_failures() as error:
        roles = ", ".join(turn.role for turn in turns)
        raise RequestError(
            f"The model's chat template refuses a conversation of the roles {roles}: {error}. "
            "Many templates want user and assistant in turns, and some have no system role."
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """All tokens that end an answer.

    These are the EOS ids of the generation config, the config and the tokenizer,
    and the token that the chat template writes behind an assistant turn: chat
    models often name only one of the two, and then talk on.
    """
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found |= _to_ids(getattr(holder, "eos_token_id", None))
    found |= _to_ids(getattr(tokenizer, "eos_token_id", None))
    found |= _to_ids(find_end_of_turn_id(tokenizer))
    return frozenset(found)


def find_end_of_turn_id(tokenizer: Any) -> int | None:
    """The special token behind an assistant turn, or None when the template has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except template_failures():
        return None
    tail = text.rpartition(_PROBE)[2].lstrip()
    added = tokenizer.get_added_vocab()
    names = [name for name in added if name and tail.startswith(name)]
    return added[max(names, key=len)] if names else None


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """A text with the tokenizer's own BOS, but without an EOS that would end it."""
    ids = list(tokenizer(text)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids.pop()
    return ids


def _to_ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(item) for item in value} if isinstance(value, (list, tuple)) else {int(value)}
