"""Tokens in, text out: no half characters, no stop strings.

A Chinese character or an emoji may take several tokens, and a lone token of it
decodes to U+FFFD.  So a piece of text is given out only when it ends in a whole
character.  The start of what may become a stop string is kept back too.

    ids   . . . . . . . [prefix . . read] . . .
    piece = decode(ids[prefix:]) without the text of ids[prefix:read]

Decoding from ``prefix``, not from the piece alone, keeps the space that some
tokenizers drop at the start of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF_CHARACTER = "\ufffd"


class TextStream:
    """The text of one answer as it grows.

    Args:
        tokenizer: anything with transformers' ``decode``.
        stop: the text ends before the first of these.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._prefix = self._read = 0
        self._held = ""
        self._given: list[str] = []
        self.is_stopped = False

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._given)

    def push(self, token_id: int) -> str:
        """Takes a token; the text that can be shown because of it, often empty.

        Guarantees:
            the pieces of all pushes and of ``flush`` joined are the decoded answer
            (without special tokens, a stop string and what follows it, or half a
            character at the end).
        """
        if self.is_stopped:
            return ""
        self._ids.append(token_id)
        whole = self._decode(self._prefix, None)
        if whole.endswith(HALF_CHARACTER):
            return ""
        piece = whole[len(self._decode(self._prefix, self._read)) :]
        if piece:
            self._prefix, self._read = self._read, len(self._ids)
        return self._give(piece)

    def flush(self) -> str:
        """What was kept back, once no more tokens come."""
        if self.is_stopped:
            return ""
        rest = self._decode(self._prefix, None)[len(self._decode(self._prefix, self._read)) :]
        self._prefix = self._read = len(self._ids)
        piece = self._give(rest.rstrip(HALF_CHARACTER))
        if not self.is_stopped and self._held:
            self._given.append(self._held)
            piece, self._held = piece + self._held, ""
        return piece

    def _decode(self, start: int, end: int | None) -> str:
        return self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _give(self, piece: str) -> str:
        text = self._held + piece
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            shown = text[: min(found)]
        else:
            num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
            shown, self._held = text[: len(text) - num_held], text[len(text) - num_held :]
        self._given.append(shown)
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest start of ``stop`` that ``text`` ends with.

    >>> _overlap("one.#", "##"), _overlap("one.", "##")
    (1, 0)
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
