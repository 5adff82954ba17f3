"""Token ids of a text put together from words that have been met before.

A fast tokenizer splits a text at its special tokens and then into words, and the ids of a
word depend on nothing around it.  Most words of a text have been met, so that looking them
up costs a tenth of tokenising them:

    split at special tokens -> split at single spaces -> look up, tokenise the unknown -> join

Where a text may be cut without a change of its ids is read off the tokenizer's parts and
tried out on every pair of characters (``is_word_wise``), and the first texts, and later
one of every call, are encoded both ways.  A tokenizer that fails either encodes its texts whole.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

Encoded = tuple[np.ndarray, np.ndarray]

MAX_WORDS = 200_000  # about 40 MB; when they are met, the memory starts again
MAX_CHARS = 64  # of a word that is kept
_WORDS_AT_ONCE = 1000
_CHECKED_TEXTS = 16
_HEAD = "\0"  # marks the first word of a text, which no space stands before
_EDGES = frozenset(string.ascii_letters + string.digits + string.punctuation)
_PART_TYPES = {"ByteLevel", "Digits", "Split", "BertPreTokenizer", "Whitespace"}
_HARMLESS = re.compile(  # what a pattern may hold of spaces: a leading one, or runs of them
    r"\[\^[^\]]*\]|\\s[+*](?:\[\\r\\n\][+*]?|\(\?!\\S\))?| \?"
)
_TRIED = string.punctuation + "aZ09"


class WordMemory:
    """The ids of the words that a tokenizer was given so far, and where they stand in the word.

    All are held end to end in a few arrays: a word has a number, and the tokens from
    ``firsts[number]`` to ``firsts[number + 1]``.

    Args:
        tokenizer: of which ``is_word_wise`` holds.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._forget()
        marks = [
            token.content for token in tokenizer.added_tokens_decoder.values()
            if token.special and not token.normalized
        ]  # fmt: skip
        listed = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
        self._marks = re.compile(f"({listed})") if listed else None
        self._left_to_check = _CHECKED_TEXTS
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        place = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self._before = np.asarray(whole[:place], dtype=np.int32)
        self._after = np.asarray(whole[place + len(bare) :], dtype=np.int32)

    def add_around(self, ids: np.ndarray) -> np.ndarray:
        """Ids with the special tokens that the tokenizer puts around a whole text."""
        return np.concatenate([self._before, ids, self._after])

    def encode(self, texts: Sequence[str]) -> list[Encoded] | None:
        """Each text as the tokenizer encodes it, without what stands around a whole text.

        Returns:
            ids [T] and the characters where tokens begin and end [T, 2]; None from when a
            checked text is encoded otherwise on.
        """
        if self._left_to_check < 0:
            return None
        self._tokenizer("")  # sets truncation and padding aside, which a saved tokenizer may have
        found = self._look_up(texts)
        checked = texts[: max(1, self._left_to_check)]  # later, one of each call
        whole = self._encode([_HEAD + text for text in checked])
        self._left_to_check = max(0, self._left_to_check - len(checked))
        if not all(_is_same(*pair) for pair in zip(whole, found, strict=False)):
            self._left_to_check = -1
            return None
        return found

    def _look_up(self, texts: Sequence[str]) -> list[Encoded]:
        if len(self._numbers) > MAX_WORDS:
            self._forget()
        split = [self._split(text) for text in texts]
        unknown = set(chain.from_iterable(split)).difference(self._numbers)
        odd = {word for word in unknown if not _is_plain(word)}
        if odd:
            unknown -= odd
            for place, words in enumerate(split):
                if not odd.isdisjoint(words):
                    split[place] = list(_join_odd(words))
                    unknown |= set(split[place]).difference(self._numbers)
        long = {word for word in unknown if len(word) > MAX_CHARS}
        self._learn(unknown - long)
        num_kept = len(self._numbers)
        self._learn(long)
        found = self._join(split)
        self._shorten(long, num_kept)
        return found

    def _join(self, split: Sequence[Sequence[str]]) -> list[Encoded]:
        """Texts from the tokens of their words, all of which are known."""
        edges = np.cumsum([0, *map(len, split)])  # words before each text
        words = np.fromiter(
            map(self._numbers.__getitem__, chain.from_iterable(split)), np.int64, edges[-1]
        )
        counts = self._firsts[words + 1] - self._firsts[words]
        tokens, chars = _sum_before(counts), _sum_before(self._widths[words])
        places = np.arange(tokens[-1]) + np.repeat(self._firsts[words] - tokens[:-1], counts)
        starts = chars[:-1] - np.repeat(chars[edges[:-1]], np.diff(edges))  # of words in their text
        ids, offsets = self._ids[places], self._offsets[places]
        offsets += np.repeat(starts, counts).astype(np.int32)[:, None]
        bounds = tokens[edges].tolist()
        return [(ids[a:b], offsets[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}
        self._firsts, self._widths = np.zeros(1, np.int64), np.zeros(0, np.int64)
        self._ids, self._offsets = np.zeros(0, np.int32), np.zeros((0, 2), np.int32)

    def _shorten(self, words: Iterable[str], num_kept: int) -> None:
        """Forgets the words that were learned last."""
        for word in words:
            del self._numbers[word]
        self._firsts, self._widths = self._firsts[: num_kept + 1], self._widths[:num_kept]
        num_tokens = int(self._firsts[-1])
        self._ids, self._offsets = self._ids[:num_tokens], self._offsets[:num_tokens]

    def _split(self, text: str) -> list[str]:
        if _HEAD in text:
            return [_HEAD + text]  # is encoded whole
        if self._marks is None:
            return (_HEAD + text).split(" ")
        words: list[str] = []
        for part in self._marks.split(text):
            if part:
                words += (_HEAD + part).split(" ")
        return words

    def _learn(self, words: Iterable[str]) -> None:
        """Tokenises words: those that a space may stand beside as one text, the others apart."""
        together, apart = [], []
        for word in words:
            is_inner = not word.startswith(_HEAD) and _is_plain(word)
            (together if is_inner else apart).append(word)
        alone = self._encode(apart)
        self._add(
            apart, [len(e.ids) for e in alone], [_width_of(word) for word in apart],
            list(chain.from_iterable(e.ids for e in alone)),
            list(chain.from_iterable(e.offsets for e in alone)),
        )  # fmt: skip
        for first in range(0, len(together), _WORDS_AT_ONCE):
            some = together[first : first + _WORDS_AT_ONCE]
            (encoding,) = self._encode([" ".join(some)])
            widths = np.asarray([_width_of(word) for word in some])
            ends, offsets = widths.cumsum(), np.asarray(encoding.offsets)
            edges = np.searchsorted(offsets[:, 1], ends, side="right")  # a word has what ends in it
            counts = np.diff(edges, prepend=0)
            offsets -= np.repeat(ends - widths, counts)[:, None]
            self._add(some, counts, widths, encoding.ids, offsets)

    def _add(self, words: Sequence[str], counts: Any, widths: Any, ids: Any, offsets: Any) -> None:
        """Keeps words with their tokens, which lie end to end.

        Args:
            counts: tokens of each word; ``widths`` its characters with the space before it.
            offsets: of tokens in their word, [T, 2].
        """
        num_known = len(self._numbers)
        self._numbers.update(zip(words, range(num_known, num_known + len(words)), strict=True))
        firsts = self._firsts[-1] + np.cumsum(np.asarray(counts, dtype=np.int64))
        offsets = np.asarray(offsets, dtype=np.int32).reshape(-1, 2)
        self._firsts = np.concatenate([self._firsts, firsts])
        self._widths = np.concatenate([self._widths, np.asarray(widths, dtype=np.int64)])
        self._ids = np.concatenate([self._ids, np.asarray(ids, dtype=np.int32)])
        self._offsets = np.concatenate([self._offsets, offsets])

    def _encode(self, words: list[str]) -> list[Any]:
        texts = [word[1:] if word.startswith(_HEAD) else f" {word}" for word in words]
        return self._tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)


def _sum_before(counts: np.ndarray) -> np.ndarray:
    """The sum of all counts before each, and of all of them, [n + 1]."""
    return np.concatenate([[0], counts.cumsum()])


def _is_same(encoding: Any, found: Encoded) -> bool:
    """Whether the tokenizer's own encoding of a text is what was found for it."""
    ids, offsets = found
    return encoding.ids == ids.tolist() and encoding.offsets == list(map(tuple, offsets.tolist()))


def _width_of(word: str) -> int:
    """Characters that a word takes in its text, with the space before it."""
    return len(word) - 1 if word.startswith(_HEAD) else len(word) + 1


def _is_plain(word: str) -> bool:
    """Whether a text may be cut before and after a word that has these ends."""
    return (word.startswith(_HEAD) or _may_begin(word)) and _may_end(word)


def _join_odd(words: list[str]) -> Iterable[str]:
    """The words, joined again where the text between them may not be cut."""
    joined = words[0]
    for word in words[1:]:
        if word.startswith(_HEAD) or (_may_end(joined) and _may_begin(word)):
            yield joined
            joined = word
        else:
            joined = f"{joined} {word}"
    yield joined


def _may_begin(word: str) -> bool:
    return bool(word) and (word[0] in _EDGES or word[0].isalpha())


def _may_end(word: str) -> bool:
    return len(word) > word.startswith(_HEAD) and (word[-1] in _EDGES or word[-1].isalpha())


def memory_of(tokenizer: Any) -> WordMemory | None:
    """A memory for a tokenizer; None where its texts must be encoded whole."""
    return WordMemory(tokenizer) if is_word_wise(tokenizer) else None


def is_word_wise(tokenizer: Any) -> bool:
    """Whether the ids of a text are those of its words, cut at special tokens and single spaces.

    Known parts whose patterns take no space in their middle, no special token that takes
    the space beside it; then tried on every pair of characters around a space.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return False
    splitters = _flatten(_read_part(backend.pre_tokenizer), "pretokenizers")
    return (
        type(backend.model).__name__ in ("BPE", "WordPiece")
        and not getattr(backend.model, "dropout", None)
        and all(_is_known_form(p) for p in _flatten(_read_part(backend.normalizer), "normalizers"))
        and bool(splitters) and all(_is_known_splitter(part) for part in splitters)
        and not any(_takes_spaces(token) for token in tokenizer.added_tokens_decoder.values())
        and _splits_at_spaces(backend)
    )  # fmt: skip


def _read_part(part: Any) -> Any:
    """A part of a tokenizer as the tokenizer's file has it."""
    return None if part is None else json.loads(part.__getstate__())


def _flatten(part: Any, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [p for inner in part[name] for p in _flatten(inner, name)] if name in part else [part]


def _is_known_form(part: dict[str, Any]) -> bool:
    return part["type"] in ("NFC", "NFKC", "BertNormalizer", "Lowercase")


def _is_known_splitter(part: dict[str, Any]) -> bool:
    if part["type"] not in _PART_TYPES or part.get("add_prefix_space"):
        return False
    if part["type"] != "Split":
        return True
    pattern = part["pattern"].get("Regex", "")
    rest = _HARMLESS.sub("", pattern)
    return bool(pattern) and part["behavior"] == "Isolated" and not re.search(r" |\\s|\\S", rest)


def _takes_spaces(token: Any) -> bool:
    content = token.content
    has_space = content != content.strip() or re.search(r"\S\s\S", content)
    return bool(token.lstrip or token.rstrip or token.single_word or has_space)


def _splits_at_spaces(backend: Any) -> bool:
    """Whether a word begins at the space between any two characters."""
    words = [word for a in _TRIED for b in _TRIED for word in (f"x{a}", f"{b}x")]
    found = backend.pre_tokenizer.pre_tokenize_str(" ".join(words))
    apart, start = [], 0
    for number, word in enumerate(words):
        text = f" {word}" if number else word
        apart += [
            (piece, (start + a, start + b))
            for piece, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)
        ]
        start += len(text)
    return found == apart
