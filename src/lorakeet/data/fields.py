"""Field names and what they stand for: which schema a row is, its question and its answer.

Data sets name the same thing in many ways; ``ALIASES`` is the one table of
them.  A schema is recognised by which kinds of field a row has, the most
specific first, so that a row with ``question``, four choices and ``answer`` is
multiple-choice rather than question-answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakeet.data.clean import is_blank
from lorakeet.data.turns import to_text

Fields = Mapping[str, Any]

ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog"),
    "answer": ("output", "answer", "response", "completion", "target"),
    "question": ("question", "query", "ask"),
    "prompt": ("prompt", "input"),
    "context": ("context", "input", "passage"),
    "text": ("text", "sentence", "content", "review", "comment", "passage"),
    "classified": ("text", "sentence", "content", "review", "comment", "question", "input",
                   "prompt", "title"),
    "label": ("label", "category", "class", "sentiment", "intent"),
    "first": ("sentence1", "premise", "question1", "text1", "text_a"),
    "second": ("sentence2", "hypothesis", "question2", "text2", "text_b"),
    "choices": ("choices", "options"),
}  # fmt: skip

CONVERSATIONS = ("messages", "sharegpt", "alpaca", "multiple-choice", "question-answer",
                 "prompt-completion")  # fmt: skip
SCHEMAS = (*CONVERSATIONS, "sentence-pair", "text-label", "text")
_LETTERS = "ABCDEFGHIJ"


def schema_name(fields: Fields) -> str:
    """The schema of a row by its field names, or ``preference``, or ``unknown``.

    Fields that are null do not count unless nothing is recognised without them.

    >>> schema_name({"Question": "1 + 1?", "Answer": "2"}), schema_name({"x": 1})
    ('question-answer', 'unknown')
    """
    lowered = lower_names(fields)
    filled = {name: value for name, value in lowered.items() if value is not None}
    name = _recognise(filled)
    return _recognise(lowered) if name == "unknown" else name


def _recognise(fields: Fields) -> str:
    def has(kind: str) -> bool:
        return find_field(fields, kind) is not None

    if "chosen" in fields and "rejected" in fields:
        return "preference"
    if has("messages"):
        return "sharegpt" if _is_sharegpt(value_of(fields, "messages")) else "messages"
    if has("first") and has("second") and has("label"):
        return "sentence-pair"
    if (has("question") or has("prompt")) and has("answer") and _has_choices(fields):
        return "multiple-choice"
    if "instruction" in fields and has("answer"):
        return "alpaca"
    if has("question") and has("answer"):
        return "question-answer"
    if has("prompt") and has("answer"):
        return "prompt-completion"
    if has("classified") and has("label"):
        return "text-label"
    return "text" if has("text") else "unknown"


def _is_sharegpt(items: Any) -> bool:
    first = items[0] if isinstance(items, list) and items else None
    return isinstance(first, Mapping) and "from" in first


def _has_choices(fields: Fields) -> bool:
    listed = value_of(fields, "choices")
    return isinstance(listed, (list, tuple)) or all(name in fields for name in "abcd")


def find_field(fields: Fields, kind: str) -> str | None:
    """The first field that goes by one of the names of a kind."""
    return next((name for name in ALIASES[kind] if name in fields), None)


def value_of(fields: Fields, kind: str) -> Any:
    """The value of the first field that goes by a name of the kind, or None."""
    name = find_field(fields, kind)
    return None if name is None else fields[name]


def lower_names(fields: Fields) -> dict[str, Any]:
    """The fields under their names in lower case, without spaces around them."""
    return {str(name).strip().lower(): value for name, value in fields.items()}


def question_of(fields: Fields, name: str) -> str:
    """What the user asks, with its context or choices below it.

    Args:
        fields: with lower-case names.
        name: one of the schemas with a single question.
    """
    if name == "alpaca":
        return _join(fields["instruction"], value_of(fields, "context"))
    if name == "question-answer":
        return _join(value_of(fields, "question"), value_of(fields, "context"))
    if name == "prompt-completion":
        return to_text(value_of(fields, "prompt"))
    question = to_text(value_of(fields, "question") or value_of(fields, "prompt"))
    choices = value_of(fields, "choices")
    if not isinstance(choices, (list, tuple)):
        letters = [letter for letter in _LETTERS if letter.lower() in fields]
        choices = [fields[letter.lower()] for letter in letters]
    listed = [
        f"{letter}. {to_text(choice)}" for letter, choice in zip(_LETTERS, choices, strict=False)
    ]
    return "\n".join([question, *listed])


def _join(question: Any, context: Any) -> str:
    asked, below = to_text(question), to_text(context)
    return asked if is_blank(below) else f"{asked}\n\n{below}"


def answer_of(fields: Fields) -> str:
    """The answer as text; the number of a choice becomes its letter, and of several the first."""
    answer = value_of(fields, "answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and find_field(fields, "choices"):
        return _LETTERS[answer] if 0 <= answer < len(_LETTERS) else str(answer)
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    return to_text(answer)
