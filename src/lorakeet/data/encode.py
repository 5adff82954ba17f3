"""From a sample to token ids and a mask of what is trained.

conversation   the rendered text (``data.render``); a token is trained when it overlaps
               an assistant text or its end token
passage        BOS where the tokenizer puts one, the text, EOS; all trained
labelled text  the encoder's special tokens around it; the label is what is trained
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakeet.base.errors import RowError
from lorakeet.base.records import EncodedSample, LabelledText, Passage, Sample
from lorakeet.data.render import Span, Tokenizer, find_trained_spans
from lorakeet.data.words import WordMemory


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """What the tokenizer is given for a sample.

    Args:
        spans: the trained characters of a conversation.
    """

    text: str
    second: str | None = None
    spans: list[Span] | None = None


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
    (found,) = encode_samples(
        [sample], tokenizer, max_tokens=max_tokens, too_long=too_long, label_names=label_names
    )
    if isinstance(found, RowError):
        raise found
    return found


def encode_samples(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    too_long: str = "drop",
    label_names: Sequence[str] = (),
    words: WordMemory | None = None,
) -> list[EncodedSample | RowError]:
    """Each sample as ``encode_sample`` gives it, or the error that it would raise.

    The tokenizer gets all texts of a kind in one call, which spares most of the time
    that transformers spends around a call and lets the tokenizer use every core.

    Args:
        words: the words that the tokenizer has met, which are not tokenised again.

    Raises:
        DataError: the tokenizer has no chat template and a sample is a conversation.
    """
    texts = [_to_text(sample, tokenizer, label_names) for sample in samples]
    tokens = _tokenize([text for text in texts if isinstance(text, _Text)], tokenizer, words)
    found: list[EncodedSample | RowError] = []
    for sample, text in zip(samples, texts, strict=True):
        if isinstance(text, RowError):
            found.append(text)
            continue
        ids, mask = next(tokens)
        try:
            if isinstance(sample, LabelledText):
                ids = _fit_labelled(ids, text, tokenizer, max_tokens, too_long)
                mask = np.zeros(len(ids), dtype=bool)
            else:
                ids, mask = _to_trained(ids, mask, tokenizer)
                ids, mask = _fit(ids, mask, max_tokens, too_long)
                _check_trained(mask)
        except RowError as error:
            found.append(error)
            continue
        label = label_names.index(sample.label) if isinstance(sample, LabelledText) else -1
        found.append(EncodedSample(ids=ids, mask=mask, origin=sample.origin, label=label))
    return found


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


def _to_text(sample: Sample, tokenizer: Tokenizer, label_names: Sequence[str]) -> _Text | RowError:
    """The text of a sample, or why it has none."""
    if isinstance(sample, Passage):
        return _Text(text=sample.text)
    if isinstance(sample, LabelledText):
        if sample.label not in label_names:
            listed = ", ".join(label_names)
            return RowError(f"the label '{sample.label}' is none of {listed}.", code="label")
        return _Text(text=sample.text, second=sample.second_text)
    try:
        text, spans = find_trained_spans(sample.turns, tokenizer)
    except RowError as error:
        return error
    return _Text(text=text, spans=spans)


def _tokenize(
    texts: Sequence[_Text], tokenizer: Tokenizer, words: WordMemory | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Ids, and of conversations which are trained, in the order of the texts."""
    found: list[tuple[np.ndarray, np.ndarray | None]] = [(np.zeros(0, np.int32), None)] * len(texts)
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


def _look_up(
    texts: Sequence[_Text], words: WordMemory
) -> list[tuple[np.ndarray, np.ndarray | None]] | None:
    """Texts put together from known words; None where the tokenizer does not allow it."""
    encoded = words.encode([text.text for text in texts])
    if encoded is None:
        return None
    return [
        (words.add_around(one.ids), None) if text.spans is None
        else (one.ids, one.find_trained(text.spans))
        for text, one in zip(texts, encoded, strict=True)
    ]  # fmt: skip


def _encode_whole(
    texts: Sequence[_Text], tokenizer: Tokenizer, is_rendered: bool, is_pair: bool
) -> list[tuple[np.ndarray, np.ndarray | None]]:
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


def _to_trained(
    ids: np.ndarray, mask: np.ndarray | None, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and what is trained: of a conversation what is said, of a passage all.

    A passage has BOS where the tokenizer puts one, the text and EOS.

    Raises:
        RowError: two BOS tokens stand at the head.
    """
    if mask is None:
        eos = tokenizer.eos_token_id
        if eos is not None and (not len(ids) or ids[-1] != eos):
            ids = np.append(ids, np.int32(eos))
        mask = np.ones(len(ids), dtype=bool)
    _check_bos(ids, tokenizer)
    mask[:1] = False
    return ids, mask


def _fit_labelled(
    ids: np.ndarray, text: _Text, tokenizer: Tokenizer, max_tokens: int, too_long: str
) -> np.ndarray:
    """The ids of a labelled text inside the window, its special tokens kept.

    Raises:
        RowError: they are too many, and cutting is not asked for.
    """
    if len(ids) > max_tokens and too_long == "cut":
        options = {"truncation": "longest_first", "max_length": max_tokens}
        cut = tokenizer(text.text, text.second, **options)["input_ids"]
        ids = np.asarray(cut, dtype=np.int32)
    return _fit(ids, np.zeros(len(ids), dtype=bool), max_tokens, too_long)[0]


def _check_trained(mask: np.ndarray) -> None:
    """A sample without a trained token is no sample."""
    if not mask.any():
        raise RowError(
            "no token of this sample would be trained; it needs an assistant turn with text "
            "inside the window.",
            code="no-trained-token",
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
