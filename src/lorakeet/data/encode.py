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
) -> list[EncodedSample | RowError]:
    """Each sample as ``encode_sample`` gives it, or the error that it would raise.

    The tokenizer gets all texts of a kind in one call, which spares most of the time
    that transformers spends around a call and lets the tokenizer use every core.

    Raises:
        DataError: the tokenizer has no chat template and a sample is a conversation.
    """
    texts = [_to_text(sample, tokenizer, label_names) for sample in samples]
    tokens = _tokenize([text for text in texts if isinstance(text, _Text)], tokenizer)
    found: list[EncodedSample | RowError] = []
    for sample, text in zip(samples, texts, strict=True):
        if isinstance(text, RowError):
            found.append(text)
            continue
        ids, offsets = next(tokens)
        try:
            if isinstance(sample, LabelledText):
                ids = _fit_labelled(ids, text, tokenizer, max_tokens, too_long)
                mask = np.zeros(len(ids), dtype=bool)
            else:
                ids, mask = _to_trained(ids, offsets, text, tokenizer)
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
    texts: Sequence[_Text], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Ids, and for conversations the characters of each token, in the order of the texts."""
    found: list[tuple[np.ndarray, np.ndarray | None]] = [(np.zeros(0, np.int32), None)] * len(texts)
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for place, text in enumerate(texts):
        kinds.setdefault((text.spans is not None, text.second is not None), []).append(place)
    for (is_rendered, is_pair), places in kinds.items():
        told = [[texts[place].text for place in places]]
        if is_pair:
            told.append([texts[place].second or "" for place in places])
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        encoding = tokenizer(*told, return_attention_mask=False, **options if is_rendered else {})
        for number, place in enumerate(places):
            ids = np.asarray(encoding["input_ids"][number], dtype=np.int32)
            offsets = encoding["offset_mapping"][number] if is_rendered else None
            found[place] = (ids, offsets)
    return iter(found)


def _to_trained(
    ids: np.ndarray, offsets: Any, text: _Text, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and what is trained: tokens that overlap a trained span, or all of a passage.

    A passage has BOS where the tokenizer puts one, the text and EOS.

    Raises:
        RowError: two BOS tokens stand at the head.
    """
    if text.spans is None:
        eos = tokenizer.eos_token_id
        if eos is not None and (not len(ids) or ids[-1] != eos):
            ids = np.append(ids, np.int32(eos))
        mask = np.ones(len(ids), dtype=bool)
    else:
        places = np.asarray(offsets, dtype=np.int32).reshape(-1, 2)
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in text.spans:
            mask |= (places[:, 0] < end) & (places[:, 1] > start)
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
