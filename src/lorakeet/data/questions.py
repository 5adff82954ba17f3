"""Questions with known short answers, read for evaluation by generation.

A row is ``{"messages": [...], "answer": ...}`` or any schema with one question
and one answer.  A conversation without an ``answer`` field is asked up to its
last assistant turn, which is the answer.  The group is the first of the
fields ``skill``, ``group``, ``subject``, ``category``, ``type``.

Unlike training rows, a question that cannot be read is an error: a score over
fewer questions than the file holds would not be the score of that file.
"""

from __future__ import annotations

from typing import Any

from lorakeet.base.errors import DataError, RowError
from lorakeet.base.records import DroppedRow, Question, RawRow, Turn
from lorakeet.data.clean import is_blank
from lorakeet.data.fields import CONVERSATIONS, answer_of, find_field, question_of, schema_name
from lorakeet.data.sources import read_rows
from lorakeet.data.turns import read_turns, to_text, with_system

GROUP_FIELDS = ("skill", "group", "subject", "category", "type")
NO_GROUP = "all"
_SHOWN_PROBLEMS = 10


def read_questions(path: str) -> list[Question]:
    """All questions of a file or folder, in file order.

    Raises:
        DataError: any row cannot be read or is no question; up to ten problems
            are listed with file, line and reason.
    """
    problems: list[str] = []
    questions: list[Question] = []

    def note(row: DroppedRow) -> None:
        problems.append(f"{row.origin}: {row.reason}")

    for row in read_rows(path, note):
        try:
            questions.append(to_question(row))
        except RowError as error:
            problems.append(f"{row.origin}: {error.reason}")
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = problems[:_SHOWN_PROBLEMS] + ([f"... and {more} more."] if more > 0 else [])
        raise DataError(
            f"{path}: {len(problems)} rows are no question with a known answer. A score needs "
            "all of them; mend or remove these:\n" + "\n".join(shown)
        )
    return questions


def to_question(row: RawRow) -> Question:
    """The question that a row asks.

    Raises:
        RowError: there is no question or no answer, or the last turn before the
            answer is not the user's.
    """
    fields: dict[str, Any] = {str(name).lower(): value for name, value in row.fields.items()}
    group = next((str(fields[name]) for name in GROUP_FIELDS if fields.get(name)), NO_GROUP)
    name = schema_name(row.fields)
    if name not in CONVERSATIONS:
        raise RowError(
            f"the fields ({', '.join(map(str, row.fields))}) hold no question with an answer; "
            'needed are "question" and "answer", or "messages" and "answer".',
            code="unknown-schema",
        )
    if name in ("messages", "sharegpt"):
        turns, answer = _from_messages(fields)
    else:
        turns = (Turn(role="user", content=question_of(fields, name)),)
        answer = answer_of(fields)
    if is_blank(answer):
        raise RowError("the answer is empty. Fill it in.", code="empty-answer")
    if not turns or turns[-1].role not in ("user", "tool") or is_blank(turns[-1].content):
        raise RowError(
            "the question is empty or does not end with a user turn. Fill it in.",
            code="empty-question",
        )
    turns = with_system(turns, to_text(fields.get("system")), "")
    return Question(turns=turns, answer=answer.strip(), group=group, origin=row.origin)


def _from_messages(fields: dict[str, Any]) -> tuple[tuple[Turn, ...], str]:
    items = fields[str(find_field(fields, "messages"))]
    turns = read_turns(items if isinstance(items, list) else [items])
    if find_field(fields, "answer") is not None:
        return turns, answer_of(fields)
    if turns and turns[-1].role == "assistant":
        return turns[:-1], turns[-1].content
    return turns, ""
