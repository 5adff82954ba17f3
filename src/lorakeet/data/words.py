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
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np

Span = tuple[int, int]

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
    """The ids of the words that a tokenizer was given so far.

    Args:
        tokenizer: of which ``is_word_wise`` holds.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, bytes] = {}
        self._offsets: dict[str, np.ndarray] = {}
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

    def encode(self, texts: Sequence[str]) -> list[Words] | None:
        """The words of each text with their ids, without what stands around a whole text.

        Returns:
            None from when the ids of a checked text are others than those of the whole text on.
        """
        if self._left_to_check < 0:
            return None
        self._tokenizer("")  # sets truncation and padding aside, which a saved tokenizer may have
        found = self._look_up(texts)
        checked = texts[: max(1, self._left_to_check)]  # later, one of each call
        whole = self._encode([_HEAD + text for text in checked])
        self._left_to_check = max(0, self._left_to_check - len(checked))
        if any(one.ids != two.ids.tolist() for one, two in zip(whole, found, strict=False)):
            self._left_to_check = -1
            return None
        return found

    def _look_up(self, texts: Sequence[str]) -> list[Words]:
        if len(self._ids) > MAX_WORDS:
            self._ids.clear()
        if len(self._offsets) > MAX_WORDS:
            self._offsets.clear()
        split = [self._split(text) for text in texts]
        unknown = set().union(*split).difference(self._ids)
        odd = {word for word in unknown if not _is_plain(word)}
        if odd:
            split = [w if odd.isdisjoint(w) else list(_join_odd(w)) for w in split]
            unknown = set().union(*split).difference(self._ids)
        self._learn(unknown)
        found = [Words(words, [self._ids[word] for word in words], self) for words in split]
        for word in unknown:
            if len(word) > MAX_CHARS:
                del self._ids[word]
        return found

    def offsets_of(self, word: str) -> np.ndarray:
        """Where each token of a word begins and ends, in characters of the word with its space."""
        if word not in self._offsets:
            (encoding,) = self._encode([word])
            self._offsets[word] = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return self._offsets[word]

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
        """Tokenises words: in one call those that a space may stand beside, the others apart."""
        together, apart = [], []
        for word in words:
            is_inner = not word.startswith(_HEAD) and _is_plain(word)
            (together if is_inner else apart).append(word)
        for word, encoding in zip(apart, self._encode(apart), strict=True):
            self._ids[word] = np.asarray(encoding.ids, dtype=np.int32).tobytes()
        for first in range(0, len(together), _WORDS_AT_ONCE):
            self._learn_together(together[first : first + _WORDS_AT_ONCE])

    def _learn_together(self, words: list[str]) -> None:
        """Tokenises words as one text; a token is of the word that it ends in."""
        (encoding,) = self._encode([" ".join(words)])
        ids = np.asarray(encoding.ids, dtype=np.int32)
        token_ends = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
        word_ends = np.cumsum([len(word) + 1 for word in words])
        edges = [0, *np.searchsorted(token_ends, word_ends, side="right").tolist()]
        for word, start, end in zip(words, edges, edges[1:], strict=False):
            self._ids[word] = ids[start:end].tobytes()

    def _encode(self, words: list[str]) -> list[Any]:
        texts = [word[1:] if word.startswith(_HEAD) else f" {word}" for word in words]
        return self._tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)


class Words:
    """A text as words, and the ids of each as bytes."""

    def __init__(self, words: list[str], ids: list[bytes], memory: WordMemory) -> None:
        self._words, self._bytes, self._memory = words, ids, memory
        self.ids = np.frombuffer(b"".join(ids), dtype=np.int32)

    def find_trained(self, spans: Sequence[Span]) -> np.ndarray:
        """Which tokens overlap one of the spans of characters, bool [T]."""
        size = len(self._words)
        is_head = np.fromiter(map(str.startswith, self._words, repeat(_HEAD)), bool, size)
        chars = np.fromiter(map(len, self._words), np.int64, size) + 1 - 2 * is_head
        ends = np.cumsum(chars).tolist()
        tokens = [0, *np.cumsum(np.fromiter(map(len, self._bytes), np.int64, size) >> 2).tolist()]
        mask = np.zeros(len(self.ids), dtype=bool)
        for start, end in spans:
            first = bisect_left(ends, start)
            last = min(bisect_right(ends, end), size - 1)
            if first + 1 < last:
                mask[tokens[first + 1] : tokens[last]] = True
            for place in {first, last} if first < size else ():
                before = ends[place - 1] if place else 0
                offsets = self._memory.offsets_of(self._words[place]) + before
                mask[tokens[place] : tokens[place + 1]] |= (
                    (offsets[:, 0] < end) & (offsets[:, 1] > start)
                )  # fmt: skip
        return mask


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
