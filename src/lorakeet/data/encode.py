"""From a sample to token ids and a mask of what is trained.

conversation   the rendered text (``data.render``); a token is trained when it overlaps
               an assistant text or its end token
passage        BOS where the tokenizer puts one, the text, EOS; all trained
labelled text  the encoder's special tokens around it; the label is what is trained
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakeet.base.errors import RowError
from lorakeet.base.records import Conversation, EncodedSample, LabelledText, Passage, Sample, Turn
from lorakeet.data.render import Frames, Tokenizer, find_spans_of, render_all
from lorakeet.data.texts import Text, tokenize
from lorakeet.data.words import WordMemory, memory_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Met:
    """What a tokenizer has met, which is not worked out again.

    Args:
        words: None for a tokenizer whose texts are encoded whole.
        frames: of its chat template.
    """

    words: WordMemory | None
    frames: Frames

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Met:
        """Nothing met so far."""
        return cls(words=memory_of(tokenizer), frames=Frames(tokenizer))


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
    met: Met | None = None,
) -> list[EncodedSample | RowError]:
    """Each sample as ``encode_sample`` gives it, or the error that it would raise.

    The tokenizer gets all texts of a kind in one call, which spares most of the time
    that transformers spends around a call and lets the tokenizer use every core.

    Args:
        met: what former calls have met of words and of conversations; it changes no result.

    Raises:
        DataError: the tokenizer has no chat template and a sample is a conversation.
    """
    met = met or Met(words=None, frames=Frames(tokenizer))
    texts = _to_texts(samples, tokenizer, label_names, met.frames)
    tokens = tokenize([text for text in texts if isinstance(text, Text)], tokenizer, met.words)
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


def _to_texts(
    samples: Sequence[Sample], tokenizer: Tokenizer, label_names: Sequence[str], frames: Frames
) -> list[Text | RowError]:
    """The text of each sample, or why it has none."""
    conversations = [sample.turns for sample in samples if isinstance(sample, Conversation)]
    rendered = iter(render_all(conversations, tokenizer))
    return [
        _to_text(sample, label_names) if not isinstance(sample, Conversation)
        else _with_spans(next(rendered), sample.turns, tokenizer, frames)
        for sample in samples
    ]  # fmt: skip


def _to_text(sample: Passage | LabelledText, label_names: Sequence[str]) -> Text | RowError:
    """The text of a sample without turns, or why it has none."""
    if isinstance(sample, Passage):
        return Text(text=sample.text)
    if sample.label not in label_names:
        listed = ", ".join(label_names)
        return RowError(f"the label '{sample.label}' is none of {listed}.", code="label")
    return Text(text=sample.text, second=sample.second_text)


def _with_spans(
    text: str | RowError, turns: Sequence[Turn], tokenizer: Tokenizer, frames: Frames
) -> Text | RowError:
    """A rendered conversation with its trained characters, or why it cannot be trained."""
    if isinstance(text, RowError):
        return text
    try:
        spans = frames.find_spans(text, turns) or find_spans_of(text, turns, tokenizer)
    except RowError as error:
        return error
    return Text(text=text, spans=spans)


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
    ids: np.ndarray, text: Text, tokenizer: Tokenizer, max_tokens: int, too_long: str
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
