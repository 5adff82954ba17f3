"""What the fields of a row mean: the schemas that data sets use, recognised by their names.

| schema | fields |
|---|---|
| messages | messages: [{role, content}] |
| sharegpt | conversations: [{from, value}] |
| alpaca | instruction, (input), output, (system), (history) |
| multiple-choice | question, A, B, C, D (or choices), answer |
| question-answer | question, (context), answer |
| prompt-completion | prompt, completion |
| sentence-pair | sentence1, sentence2, label |
| text-label | text, label |
| text | text |

Case does not matter, common other names are known (``ALIASES``), and further
fields are left alone.  ``data.text_column`` and ``data.label_column`` name the
columns of a row that is none of these.
"""

from __future__ import annotations

from typing import Any

import orjson

from lorakeet.base.errors import RowError
from lorakeet.base.recipe import DataSettings
from lorakeet.base.records import Conversation, LabelledText, Passage, RawRow, Sample, Turn
from lorakeet.data.clean import is_blank
from lorakeet.data.fields import (
    CONVERSATIONS,
    SCHEMAS,
    Fields,
    answer_of,
    find_field,
    lower_names,
    question_of,
    schema_name,
    value_of,
)
from lorakeet.data.turns import read_turns, to_text, tools_to_text, with_system

__all__ = ["schema_name", "to_sample"]


def to_sample(row: RawRow, *, task: str, settings: DataSettings) -> Sample:
    """The sample that a row holds, in the form that the task trains on.

    Args:
        task: ``chat`` takes conversations and running text, ``text`` running
            text, ``classify`` labelled text.

    Raises:
        RowError: the fields are not recognised, do not suit the task, or hold
            nothing to train on; the reason names the fields that were found.

    Guarantees: a Conversation has an assistant turn, and none of them is blank;
    a Passage and a LabelledText are not blank; labels are strings.
    """
    if settings.text_column or (settings.label_column and task == "classify"):
        return _by_columns(row, task, settings)
    name = schema_name(row.fields)
    fields = lower_names(row.fields)
    if name == "unknown":
        raise _unknown(row.fields)
    if name == "preference":
        raise RowError(
            "the row is a preference pair (chosen, rejected), which needs preference training. "
            "Keep the chosen answer as 'output' to train on it.",
            code="unsupported-schema",
        )
    if task == "classify":
        return _to_labelled(fields, name, row, settings)
    if name == "text" or (name == "text-label" and task == "text"):
        return Passage(text=_needed_text(value_of(fields, "text"), "text"), origin=row.origin)
    if name not in CONVERSATIONS:
        raise _wrong_task(name, task, "classify, or name data.text_column and data.label_column")
    if task == "text":
        raise _wrong_task(name, task, "chat, which trains on the answers")
    turns = with_system(
        _to_turns(fields, name),
        to_text(fields.get("system")) or settings.system or "",
        tools_to_text(fields.get("tools")),
    )
    return Conversation(turns=_checked(turns), origin=row.origin)


def _unknown(fields: Fields) -> RowError:
    found = ", ".join(str(name) for name in list(fields)[:12]) or "none"
    return RowError(
        f"the fields ({found}) are of no known schema. Known are {', '.join(SCHEMAS)}. "
        "Rename the fields, or name them in data.text_column and data.label_column.",
        code="unknown-schema",
    )


def _wrong_task(name: str, task: str, wanted: str) -> RowError:
    return RowError(
        f"the row is {name}, which task: {task} cannot train on. Set task: {wanted}.",
        code="wrong-task",
    )


def _to_turns(fields: Fields, name: str) -> tuple[Turn, ...]:
    if name in ("messages", "sharegpt"):
        if fields.get("label") in (False, "false", "False"):
            raise RowError(
                "the row's label is false: its answer is marked as unwanted and must not be "
                "learned. Remove the row.",
                code="rejected-answer",
            )
        return read_turns(_to_list(value_of(fields, "messages")))
    history = []
    earlier = fields.get("history") or ()
    for pair in earlier if isinstance(earlier, (list, tuple)) else [earlier]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(
                "history needs pairs [question, answer]. Rewrite it so.", code="bad-turn"
            )
        history += [("user", to_text(pair[0])), ("assistant", to_text(pair[1]))]
    question, answer = question_of(fields, name), answer_of(fields)
    pairs = [*history, ("user", question), ("assistant", answer)]
    return tuple(Turn(role=role, content=content) for role, content in pairs)


def _to_list(items: Any) -> list[Any]:
    """The messages as a list; CSV and some Parquet files hold them as JSON text."""
    if isinstance(items, str):
        try:
            items = orjson.loads(items)
        except orjson.JSONDecodeError:
            items = None
    if not isinstance(items, list):
        raise RowError("the messages are not a list of turns. Rewrite them so.", code="bad-turn")
    return items


def _checked(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError(
            "no assistant turn is in the conversation, so no token of it would be trained. "
            "Remove the row or add an answer.",
            code="no-assistant-turn",
        )
    for number, turn in enumerate(turns, start=1):
        if turn.role == "assistant" and is_blank(turn.content):
            raise RowError(
                f"the assistant turn (turn {number}) is empty, so there is nothing to learn from "
                "it. Remove the row or fill in the answer.",
                code="empty-answer",
            )
        if turn.role == "user" and is_blank(turn.content):
            raise RowError(
                f"the user turn (turn {number}) is empty. Remove the row or fill in the question.",
                code="empty-question",
            )
    return turns


def _needed_text(value: Any, name: str) -> str:
    if isinstance(value, (list, dict)):
        raise RowError(
            f"the field '{name}' holds a {type(value).__name__}, but text is needed. "
            "Flatten it first.",
            code="wrong-type",
        )
    text = to_text(value)
    if is_blank(text):
        raise RowError(
            f"the field '{name}' is empty. Remove the row or fill it.", code="empty-text"
        )
    return text


def _to_labelled(fields: Fields, name: str, row: RawRow, settings: DataSettings) -> LabelledText:
    if name == "sentence-pair":
        text = _needed_text(value_of(fields, "first"), str(find_field(fields, "first")))
        second = _needed_text(value_of(fields, "second"), str(find_field(fields, "second")))
    elif name == "text-label":
        text = _needed_text(value_of(fields, "classified"), str(find_field(fields, "classified")))
        second = None
    else:
        raise RowError(
            f"the row is {name} (fields {', '.join(map(str, row.fields))}), but task: classify "
            "needs a text and a label. Name them in data.text_column and data.label_column.",
            code="wrong-columns",
        )
    label = to_label(value_of(fields, "label"), settings)
    return LabelledText(text=text, label=label, second_text=second, origin=row.origin)


def to_label(value: Any, settings: DataSettings) -> str:
    """A label as text; with ``data.labels`` given, a number stands for the name at that place.

    Raises:
        RowError: the label is empty, or none of ``data.labels``.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes whole numbers as 1.0 where a column has gaps
    label = to_text(value).strip()
    if not label:
        raise RowError("the label is empty. Remove the row or fill it in.", code="empty-label")
    known = settings.labels
    if known is None or label in known:
        return label
    if label.isdecimal() and int(label) < len(known):
        return known[int(label)]
    raise RowError(
        f"the label {label!r} is none of data.labels ({', '.join(known)}). Correct it or add it.",
        code="unknown-label",
    )


def _by_columns(row: RawRow, task: str, settings: DataSettings) -> Sample:
    """The sample by the columns that the recipe names, whatever the row looks like."""
    if task == "classify":
        text = _column(row.fields, settings.text_column, "text_column", "classified")
        label = _column(row.fields, settings.label_column, "label_column", "label")
        return LabelledText(
            text=_needed_text(text, "text_column"),
            label=to_label(label, settings),
            origin=row.origin,
        )
    text = _needed_text(
        _column(row.fields, settings.text_column, "text_column", "text"), str(settings.text_column)
    )
    if task == "text" or settings.label_column is None:
        return Passage(text=text, origin=row.origin)
    answer = to_text(_column(row.fields, settings.label_column, "label_column", "answer"))
    turns = (Turn(role="user", content=text), Turn(role="assistant", content=answer))
    return Conversation(
        turns=_checked(with_system(turns, settings.system or "", "")), origin=row.origin
    )


def _column(fields: Fields, name: str | None, setting: str, kind: str) -> Any:
    if name is not None and name in fields:
        return fields[name]
    lowered = lower_names(fields)
    wanted = find_field(lowered, kind) if name is None else name.lower()
    if wanted in lowered:
        return lowered[wanted]
    raise RowError(
        f"the row has no column {name or kind!r}; it has {', '.join(map(str, fields))}. "
        f"Correct data.{setting}.",
        code="wrong-columns",
    )
