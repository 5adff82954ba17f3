"""Text without the damage of its travels: mojibake, control characters, stray spaces.

ftfy repairs text that was decoded with the wrong encoding.  Its defaults also
straighten quotes and narrow full-width characters, which rewrites correct
Chinese and Japanese punctuation; both are off here.  HTML entities stay, as
"write &amp;amp; for &amp;" may be the very thing to learn.

Cost: ftfy takes a millisecond a text, so text of characters that it never changes, alone or
beside each other, skips it: ASCII, dashes, curly quotes, Chinese, kana.

Every rule may be applied twice without a change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import ftfy

from lorakeet.base.records import Conversation, LabelledText, Passage, Sample, Turn

_FTFY = ftfy.TextFixerConfig(
    uncurl_quotes=False, fix_character_width=False, unescape_html=False, normalization="NFC"
)
# None of them takes part in mojibake with the others (ftfy.badness), composes or is a control.
_SOUND = re.compile(
    "[\t\n -~\u2013\u2014\u2018\u2019\u201c\u201d\u2022\u2026\u3000-\u3029"
    "\u3041-\u3096\u30a1-\u30fc\u3400-\u4dbf\u4e00-\u9fff\uff01-\uff60]*"
)
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad\ufffe\uffff]")  # joiners stay: emoji need them
_ODD_SPACE = re.compile("[\u00a0\u2000-\u200a\u202f\u205f]")  # U+3000 stays: it indents Chinese
_TERMINAL_COLOUR = re.compile("\x1b\\[[0-9;]*[A-Za-z]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_LINE_END_SPACE = re.compile(r"[ \t]+(?=\n)")
_BLANK_LINES = re.compile(r"\n{3,}")


def clean_text(text: str) -> str:
    """A text with repaired characters, plain spaces, at most one blank line in a row.

    Indentation inside the text stays, as code depends on it.

    >>> clean_text("caf\u00c3\u00a9 \\r\\n\\n\\n\\nau lait\u200b ")
    'café\\n\\nau lait'
    >>> clean_text("“你好”，　ＡＢＣ！")
    '“你好”，　ＡＢＣ！'
    """
    if not text.isascii() and not _SOUND.fullmatch(text):
        text = ftfy.fix_text(text, _FTFY)
        text = _ODD_SPACE.sub(" ", _INVISIBLE.sub("", text))
    if _CONTROL.search(text):
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = _CONTROL.sub("", _TERMINAL_COLOUR.sub("", text))
    if " \n" in text or "\t\n" in text:
        text = _LINE_END_SPACE.sub("", text)
    if "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    return text.strip()


def clean_sample(sample: Sample) -> Sample:
    """A sample with every text cleaned; roles, label and origin stay."""
    return map_text(sample, clean_text)


def map_text(sample: Sample, change: Callable[[str], str]) -> Sample:
    """A sample with ``change`` applied to each of its texts, the label excepted."""
    if isinstance(sample, Conversation):
        turns = tuple([Turn(role=turn.role, content=change(turn.content)) for turn in sample.turns])
        return Conversation(turns=turns, origin=sample.origin)
    if isinstance(sample, Passage):
        return replace(sample, text=change(sample.text))
    second = None if sample.second_text is None else change(sample.second_text)
    return replace(sample, text=change(sample.text), second_text=second)


def texts_of(sample: Sample) -> tuple[str, ...]:
    """All texts of a sample in their order, the label excepted."""
    if isinstance(sample, Conversation):
        return tuple(turn.content for turn in sample.turns)
    if isinstance(sample, LabelledText) and sample.second_text is not None:
        return (sample.text, sample.second_text)
    return (sample.text,)


def is_blank(text: str) -> bool:
    """Whether nothing is left to read once spaces and invisible characters are gone.

    >>> is_blank(" \u200b\\n"), is_blank(".")
    (True, False)
    """
    if "!" <= text[:1] <= "~":
        return False
    return not _CONTROL.sub("", _INVISIBLE.sub("", text)).strip()
