"""Long text cut into passages of bounded size, at headings, paragraphs and sentences.

    lines -> blocks (a paragraph, a table, a code block) -> passages

Blocks are gathered until the next one would not fit.  A Markdown heading is
carried as context: a passage opens with the headings above it ("# Law",
"## Chapter 2"), so that a passage from the middle still says what it is about.
A block longer than a passage is cut at the last line end, sentence end, clause
or space that fits; between two Chinese characters if there is none, and inside
a word only when the word alone is longer than a passage.

Cost: one passage in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

MAX_CHARS = 1500  # about 350 English or 1,000 Chinese tokens: several fit one window
SMALL_CHARS = 400  # a section shorter than this shares its passage with the next

_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"\s*(```|~~~)")
_WIDE = "\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_CUTS = (
    re.compile(r"\n"),
    re.compile(r"[。！？；][”’」』）]*|[.!?][\"'”’)]*(?=\s)"),
    re.compile(r"[，、：]|[,;:](?=\s)"),
    re.compile(r"\s"),
    re.compile(f"(?<=[{_WIDE}])(?=.)|(?=[{_WIDE}])"),
)

Headings = tuple[str, ...]


def to_passages(
    lines: Iterable[str], *, is_markdown: bool = False, max_chars: int = MAX_CHARS
) -> Iterator[str]:
    """Passages of at most ``max_chars`` characters, in the order of the text.

    Args:
        lines: without their line ends; consumed as they are needed.
        is_markdown: heed headings, code fences and front matter.

    Guarantees: every word of the text is in a passage, and none is cut unless it
    is longer than a passage.

    >>> list(to_passages(["# A", "one", "", "# B", "two"], is_markdown=True))
    ['# A\\n\\none\\n\\n# B\\n\\ntwo']
    """
    blocks = _markdown_blocks(lines) if is_markdown else _plain_blocks(lines)
    current, current_headings = "", ()
    for headings, block in blocks:
        addition = _open_with(_headings_to_say(current_headings, headings), block)
        starts_section = headings != current_headings and len(current) >= SMALL_CHARS
        if current and not starts_section and len(current) + len(addition) + 2 <= max_chars:
            current = f"{current}\n\n{addition}"
        else:
            if current:
                yield current
            context = _trim(headings, max_chars)
            *full, current = split_block(block, max_chars, context)
            yield from full
        current_headings = headings
    if current:
        yield current


def split_block(block: str, max_chars: int, context: Headings = ()) -> list[str]:
    """A block as pieces of at most ``max_chars``, each opened with the context.

    >>> split_block("One two. Three four five.", 14)
    ['One two.', 'Three four', 'five.']
    """
    room = max_chars - sum(len(line) + 2 for line in context)
    pieces = []
    while len(block) > room:
        end = _find_cut(block, room)
        pieces.append(_open_with(context, block[:end].rstrip()))
        block = block[end:].lstrip("\n ")
    if block:
        pieces.append(_open_with(context, block))
    return pieces


def _find_cut(block: str, room: int) -> int:
    """The end of the longest good piece: sentence ends beat spaces if past the middle."""
    for pattern in _CUTS:
        ends = [found.end() for found in pattern.finditer(block, 0, room + 1)]
        ends = [end for end in ends if end <= room]
        if ends and ends[-1] > room // 2:
            return ends[-1]
    for pattern in reversed(_CUTS):  # nothing past the middle: any place is better than a word
        ends = [found.end() for found in pattern.finditer(block, 0, room + 1)]
        ends = [end for end in ends if 0 < end <= room]
        if ends:
            return ends[-1]
    return room


def _headings_to_say(said: Headings, wanted: Headings) -> Headings:
    """The headings that a passage under ``said`` must add to stand under ``wanted``."""
    common = 0
    while common < min(len(said), len(wanted)) and said[common] == wanted[common]:
        common += 1
    return wanted[common:]


def _trim(headings: Headings, max_chars: int) -> Headings:
    """The innermost headings that leave at least half of the passage to the text."""
    while headings and sum(len(line) + 2 for line in headings) > max_chars // 2:
        headings = headings[1:]
    return headings


def _open_with(headings: Headings, block: str) -> str:
    return "\n\n".join((*headings, block))


def _plain_blocks(lines: Iterable[str]) -> Iterator[tuple[Headings, str]]:
    for block in _paragraphs(lines):
        yield (), block


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Runs of lines without a blank one; a run over two passages is handed on at a line end."""
    held: list[str] = []
    num_chars = 0
    for line in lines:
        if line.strip():
            held.append(line.rstrip())
            num_chars += len(line) + 1
        if held and (not line.strip() or num_chars >= 2 * MAX_CHARS):
            yield "\n".join(held)
            held, num_chars = [], 0
    if held:
        yield "\n".join(held)


def _markdown_blocks(lines: Iterable[str]) -> Iterator[tuple[Headings, str]]:
    """Paragraphs with the headings above them; a code block is one paragraph."""
    above: dict[int, str] = {}
    held: list[str] = []
    fence = ""
    has_text = False  # a heading without text below it would be lost, so it becomes a block
    for line in skip_front_matter(lines):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark.group(1)
        elif mark and mark.group(1) == fence:
            fence = ""
        heading = None if fence else _HEADING.match(line)
        if heading is None and (line.strip() or fence):
            held.append(line.rstrip())
            continue
        if held:
            yield tuple(above.values()), "\n".join(held)
            held, has_text = [], True
        if heading:
            level = len(heading.group(1))
            if above and not has_text and level <= max(above):
                innermost = above.pop(max(above))
                yield tuple(above.values()), innermost
            above = {depth: title for depth, title in above.items() if depth < level}
            above[level] = f"{heading.group(1)} {heading.group(2)}"
            has_text = False
    if held:
        yield tuple(above.values()), "\n".join(held)
    elif above and not has_text:
        innermost = above.pop(max(above))
        yield tuple(above.values()), innermost


def skip_front_matter(lines: Iterable[str]) -> Iterator[str]:
    """The lines without a leading YAML block between two ``---``, which is not for readers.

    >>> list(skip_front_matter(["---", "sidebar: auto", "---", "# Law"]))
    ['# Law']
    """
    held: list[str] = []
    inside = None  # not known before the first line
    for line in lines:
        if inside is None:
            inside = line.strip() == "---"
        if not inside:
            yield line
            continue
        held.append(line)
        if len(held) > 1 and line.strip() in ("---", "..."):
            held, inside = [], False
        elif len(held) > 50:  # a rule, not front matter
            yield from held
            held, inside = [], False
    yield from held
