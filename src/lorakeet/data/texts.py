"""Texts as token ids: those of a kind in one call, or put together from known words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lorakeet.data.render import Span, Tokenizer
from lorakeet.data.words import WordMemory

Tokens = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """What the tokenizer is given for a sample.

    Args:
        spans: the trained characters of a conversation.
    """

    text: str
    second: str | None = None
    spans: list[Span] | None = None


def tokenize(
    texts: Sequence[Text], tokenizer: Tokenizer, words: WordMemory | None
) -> Iterator[Tokens]:
    """Ids, and of conversations which are trained, in the order of the texts."""
    found: list[Tokens] = [(np.zeros(0, np.int32), None)] * len(texts)
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for place, text in enumerate(texts):
        kinds.setdefault((text.spans is not None, text.second is not None), []).append(place)
    for (is_rendered, is_pair), places in kinds.items():
        same = [texts[place] for place in places]
        encoded = None if is_pair or words is None else _look_up(same, words)
        for place, one in zip(
            places, encoded or _encode_whole(same, tokenizer, is_rendered, is_pair), strict=True
        ):
            found[place] = one
    return iter(found)


def _look_up(texts: Sequence[Text], words: WordMemory) -> list[Tokens] | None:
    """Texts put together from known words; None where the tokenizer does not allow it."""
    encoded = words.encode([text.text for text in texts])
    if encoded is None:
        return None
    return [
        (words.add_around(ids), None) if text.spans is None
        else (ids, _find_trained(offsets, text.spans))
        for text, (ids, offsets) in zip(texts, encoded, strict=True)
    ]  # fmt: skip


def _encode_whole(
    texts: Sequence[Text], tokenizer: Tokenizer, is_rendered: bool, is_pair: bool
) -> list[Tokens]:
    """Texts of a kind by one call of the tokenizer."""
    told = [[text.text for text in texts]]
    if is_pair:
        told.append([text.second or "" for text in texts])
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    encoding = tokenizer(*told, return_attention_mask=False, **options if is_rendered else {})
    ids = [np.asarray(row, dtype=np.int32) for row in encoding["input_ids"]]
    if not is_rendered:
        return [(row, None) for row in ids]
    offsets = [np.asarray(row, dtype=np.int32) for row in encoding["offset_mapping"]]
    return [
        (row, _find_trained(places.reshape(-1, 2), text.spans or []))
        for row, places, text in zip(ids, offsets, texts, strict=True)
    ]


def _find_trained(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens overlap a trained span."""
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return mask
