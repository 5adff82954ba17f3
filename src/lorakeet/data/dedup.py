"""Repeated samples, found by a hash of what a reader would call the same text.

Two samples are the same when they agree after case, Unicode form (NFKC),
white space and sentence punctuation are set aside.  Anything that carries
meaning counts: digits, signs, the roles of the turns, the label.  Similar
texts are not called equal, as data sets from templates ("What is 7 + 5?") are
full of rows that differ in one number.

Cost: one 96-bit hash and one integer per distinct sample, about 120 bytes.
By the birthday bound two of N = 1e8 texts collide with probability
N^2 / 2^97 = 6e-14.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

from lorakeet.base.records import Conversation, LabelledText, Origin, Passage, Sample

_HASH_BYTES = 12
_LINE_BITS = 40  # room for 10^12 lines beside the file's number in one integer
_SENTENCE_MARK = re.compile(r"[.,!?;:\"'“”‘’…]+(?=\s|$)|[。，、！？；：「」『』《》]")


class Deduplicator:
    """Remembers the samples it was shown and finds the ones it has seen.

    >>> seen = Deduplicator()
    >>> first = Passage(text="Hello,  World!", origin=Origin(path="a.txt", line=1))
    >>> again = Passage(text="hello world", origin=Origin(path="b.txt", line=9))
    >>> seen.is_duplicate(first) is None, str(seen.is_duplicate(again))
    (True, 'a.txt line 1')
    """

    def __init__(self) -> None:
        self._first_seen: dict[bytes, int] = {}
        self._paths: list[str] = []
        self._number_of_path: dict[str, int] = {}

    def is_duplicate(self, sample: Sample) -> Origin | None:
        """The origin of the first sample with the same text, or None; remembers new ones."""
        return self.find_first(content_hash(sample), sample.origin)

    def find_first(self, key: bytes, origin: Origin) -> Origin | None:
        """As ``is_duplicate``, for a sample of which only hash and origin are at hand."""
        seen = self._first_seen.get(key)
        if seen is not None:
            return Origin(path=self._paths[seen >> _LINE_BITS], line=seen % (1 << _LINE_BITS))
        path = origin.path
        number = self._number_of_path.setdefault(path, len(self._paths))
        if number == len(self._paths):
            self._paths.append(path)
        self._first_seen[key] = (number << _LINE_BITS) | origin.line
        return None


def content_hash(sample: Sample) -> bytes:
    """Twelve bytes that are equal for duplicates and stay the same from run to run."""
    return hashlib.blake2b(_to_key(sample).encode(), digest_size=_HASH_BYTES).digest()


def normalise(text: str) -> str:
    """The text as it is compared: NFKC, folded case, no sentence marks, single spaces.

    >>> normalise("Ｈello,\\n WORLD!"), normalise("3.5 - 2"), normalise("你好，世界。")
    ('hello world', '3.5 - 2', '你好 世界')
    """
    bare = _SENTENCE_MARK.sub(" ", text)
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
