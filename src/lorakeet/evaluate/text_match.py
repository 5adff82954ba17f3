"""How near an answer comes to the expected one: equal, overlapping, in the same order.

    exact      equal after normalising width, case, spaces and closing punctuation
    F1         of the tokens that both have, counted with repeats (as SQuAD does)
    ROUGE-L    of their longest common subsequence, which also asks for the order

A token is a word of letters and digits, or a single Chinese, Japanese or Korean
character, as these scripts put no space between words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_ENDING = " \t\n.。!?,;:、"


def normalize_answer(text: str) -> str:
    """An answer without differences that no reader would mark as wrong.

    A leading block of thoughts is left out; full-width letters become half-width.

    >>> normalize_answer(" Ａｒｔｉｃｌｅ  12。"), normalize_answer("<think>hm</think> Yes!")
    ('article 12', 'yes')
    """
    text = unicodedata.normalize("NFKC", _THINKING.sub("", text)).casefold()
    return " ".join(text.split()).rstrip(_ENDING)


def split_tokens(text: str) -> list[str]:
    """Words and single Chinese characters, normalised; punctuation is left out.

    >>> split_tokens("Article 12: 合同成立")
    ['article', '12', '合', '同', '成', '立']
    """
    return _TOKEN.findall(normalize_answer(text))


def is_exact(got: str, expected: str) -> bool:
    """Whether two answers are equal once normalised."""
    return normalize_answer(got) == normalize_answer(expected)


def is_contained(got: str, expected: str) -> bool:
    """Whether an answer holds the expected one as a run of whole tokens.

    >>> is_contained("The answer is 12.", "12"), is_contained("It is 120.", "12")
    (True, False)
    """
    long, short = split_tokens(got), split_tokens(expected)
    if not short:
        return normalize_answer(expected) in normalize_answer(got)
    return any(long[i : i + len(short)] == short for i in range(len(long) - len(short) + 1))


def token_f1(got: str, expected: str) -> float:
    """F1 of the shared tokens, 0 to 1; two answers without tokens compare as strings.

    >>> round(token_f1("the red car", "red car"), 3)
    0.8
    """
    first, second = split_tokens(got), split_tokens(expected)
    if not first and not second:
        return float(is_exact(got, expected))
    shared = (Counter(first) & Counter(second)).total()
    return 2 * shared / (len(first) + len(second))


def rouge_l(got: str, expected: str) -> float:
    """F1 of the longest common subsequence of tokens, 0 to 1.

    Cost: the product of both lengths.
    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.
    """
    first, second = split_tokens(got), split_tokens(expected)
    if not first or not second:
        return 0.0
    return 2 * count_common_subsequence(first, second) / (len(first) + len(second))


def count_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest sequence that both hold in order, not necessarily adjacent.

    >>> count_common_subsequence("abcde", "badce")
    3
    """
    row = [0] * (len(second) + 1)
    for a in first:
        diagonal = 0
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]
