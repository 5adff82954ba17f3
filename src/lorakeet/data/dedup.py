"""Repeated samples, found by a hash of what a reader would call the same text.

Two samples are the same when they agree after case, Unicode form (NFKC),
white space and sentence punctuation are set aside.  Anything that carries
meaning counts: digits, signs, the roles of the turns, the label.  Similar
texts are not called equal, as data sets from templates ("What is 7 + 5?") are
full of rows that differ in one number.

Cost: one 96-bit hash and one integer per distinct sample in plain arrays, 27 to 53 bytes.
By the birthday bound two of N = 1e8 texts collide with probability
N^2 / 2^97 = 6e-14.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array

import numpy as np

from lorakeet.base.records import Conversation, LabelledText, Origin, Passage, Sample

_HASH_BYTES = 12
_LINE_BITS = 40  # room for 10^12 lines beside the file's number in one integer
_SENTENCE_MARK = re.compile(r"[.,!?;:\"'“”‘’…]+(?=\s|$)")
_WIDE_MARK = re.compile("[。，、！？；：「」『』《》]")


class Deduplicator:
    """Remembers the samples it was shown and finds the ones it has seen.

    >>> seen = Deduplicator()
    >>> first = Passage(text="Hello,  World!", origin=Origin(path="a.txt", line=1))
    >>> again = Passage(text="hello world", origin=Origin(path="b.txt", line=9))
    >>> seen.is_duplicate(first) is None, str(seen.is_duplicate(again))
    (True, 'a.txt line 1')
    """

    def __init__(self) -> None:
        self._first_seen = _Table()
        self._paths: list[str] = []
        self._number_of_path: dict[str, int] = {}

    def is_duplicate(self, sample: Sample) -> Origin | None:
        """The origin of the first sample with the same text, or None; remembers new ones."""
        return self.find_first(content_hash(sample), sample.origin)

    def find_first(self, key: bytes, origin: Origin) -> Origin | None:
        """As ``is_duplicate``, for a sample of which only hash and origin are at hand."""
        path = origin.path
        number = self._number_of_path.setdefault(path, len(self._paths))
        if number == len(self._paths):
            self._paths.append(path)
        seen = self._first_seen.find_or_add(key, (number << _LINE_BITS) | origin.line)
        if seen is None:
            return None
        return Origin(path=self._paths[seen >> _LINE_BITS], line=seen % (1 << _LINE_BITS))


class _Table:
    """Hashes with the number that came with each first, by open addressing in three arrays."""

    def __init__(self) -> None:
        self._count = 0
        self._clear(1 << 12)

    def find_or_add(self, key: bytes, value: int) -> int | None:
        """The number that came with a hash first; None for a new one, which is kept."""
        high, low = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
        highs, lows, values, last = self._highs, self._lows, self._values, self._size - 1
        place = high & last
        while found := values[place]:
            if highs[place] == high and lows[place] == low:
                return found - 1
            place = (place + 1) & last
        highs[place], lows[place], values[place] = high, low, value + 1  # 0 is a free place
        self._count += 1
        if 4 * self._count > 3 * self._size:
            self._grow()
        return None

    def _clear(self, size: int) -> None:
        self._size = size
        self._highs, self._lows, self._values = (
            array(kind, bytes(size * array(kind).itemsize)) for kind in "QIq"
        )

    def _grow(self) -> None:
        """Twice as many places; all hashes that still seek one take a step at a time."""
        old = [np.asarray(column) for column in (self._highs, self._lows, self._values)]
        used = np.flatnonzero(old[2])
        self._clear(2 * self._size)
        new = [np.asarray(column) for column in (self._highs, self._lows, self._values)]
        places = (old[0][used] & np.uint64(self._size - 1)).astype(np.int64)
        while len(used):
            free = new[2][places] == 0
            taken, first = np.unique(places[free], return_index=True)
            chosen = np.flatnonzero(free)[first]
            for column, source in zip(new, old, strict=True):
                column[taken] = source[used[chosen]]
            left = np.ones(len(used), dtype=bool)
            left[chosen] = False
            used, places = used[left], (places[left] + 1) & (self._size - 1)


def content_hash(sample: Sample) -> bytes:
    """Twelve bytes that are equal for duplicates and stay the same from run to run."""
    return hashlib.blake2b(_to_key(sample).encode(), digest_size=_HASH_BYTES).digest()


def normalise(text: str) -> str:
    """The text as it is compared: NFKC, folded case, no sentence marks, single spaces.

    >>> normalise("Ｈello,\\n WORLD!"), normalise("3.5 - 2"), normalise("你好，世界。")
    ('hello world', '3.5 - 2', '你好 世界')
    """
    bare = _SENTENCE_MARK.sub(" ", text)
    if not text.isascii():
        bare = _WIDE_MARK.sub(" ", bare)
    if not bare.strip():
        bare = text  # "?!" must not equal "."
    return " ".join(unicodedata.normalize("NFKC", bare).casefold().split())


def _to_key(sample: Sample) -> str:
    if isinstance(sample, Conversation):
        return "\x1e".join(f"{turn.role}\x1f{normalise(turn.content)}" for turn in sample.turns)
    if isinstance(sample, LabelledText):
        second = "" if sample.second_text is None else normalise(sample.second_text)
        return f"{normalise(sample.text)}\x1f{second}\x1f{sample.label}"
    if isinstance(sample, Passage):
        return normalise(sample.text)
    raise TypeError(f"{type(sample).__name__} is no sample")
