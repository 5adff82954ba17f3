"""Turns of a conversation from the lists that data sets hold them in.

    {"role": "user", "content": "..."}               OpenAI's messages
    {"from": "human", "value": "..."}                ShareGPT
    content: text, null, or parts [{"type": "text", "text": "..."}]

What a chat template cannot be asked for becomes text in the form that Qwen's
and Hermes' templates use: a tool call stands between <tool_call> tags, a
thought between <think> tags, and the list of tools closes the system prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import orjson

from lorakeet.base.errors import RowError
from lorakeet.base.records import Role, Turn
from lorakeet.data.clean import is_blank

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "ai": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
    "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call")
_WEIGHT_NAMES = ("loss_weight", "weight", "train", "loss")


def read_turns(items: Sequence[Any]) -> tuple[Turn, ...]:
    """The turns of a list of messages; a blank system turn is left out.

    Raises:
        RowError: an entry is no message, its role is unknown, it holds pictures
            or sound, or it asks not to be trained.
    """
    turns = []
    for number, item in enumerate(items, start=1):
        turn = _read_turn(item, number)
        if turn.role != "system" or not is_blank(turn.content):
            turns.append(turn)
    return tuple(turns)


def _read_turn(item: Any, number: int) -> Turn:
    if not isinstance(item, Mapping):
        raise RowError(
            f"turn {number} is {str(item)[:40]!r}, but a turn needs named fields such as "
            '{"role": "user", "content": "..."}.',
            code="bad-turn",
        )
    name = item.get("role", item.get("from"))
    role = ROLES.get(str(name).strip().lower())
    if role is None:
        raise RowError(
            f"turn {number} has the role {name!r}; known are {', '.join(ROLES)}. Rename it.",
            code="unknown-role",
        )
    if role == "assistant":
        _check_is_trained(item, number)
    content = to_text(item.get("content", item.get("value")), number)
    if str(name).lower() in _CALL_ROLES:
        content = _wrap("tool_call", content)
    calls = item.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        content = f"{content}\n{_render_call(call, number)}".strip()
    thought = item.get("reasoning_content")
    if thought:
        content = f"{_wrap('think', str(thought))}\n\n{content}"
    return Turn(role=role, content=content)


def _check_is_trained(item: Mapping[str, Any], number: int) -> None:
    """Refuses a weight of 0: training that turn anyway would go against the row's word."""
    for name in _WEIGHT_NAMES:
        if item.get(name) in (0, False) and item.get(name) is not None:
            raise RowError(
                f"assistant turn {number} has {name}: {item[name]}, but every assistant turn of "
                "a conversation is trained. Remove the field, or end the row before that turn.",
                code="untrained-turn",
            )


def to_text(content: Any, number: int = 1) -> str:
    """The text of a message's content, whether plain, missing, in parts or a number.

    >>> to_text([{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]), to_text(None)
    ('a\\nb', '')
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (bool, int, float)):
        return str(content)
    if isinstance(content, list):
        return "\n".join(_part_to_text(part, number) for part in content)
    return to_json(content)


def to_json(value: Any) -> str:
    """A value as compact JSON in plain characters; dates and bytes of Parquet become text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _part_to_text(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text"):
        return str(part.get("text", part.get("value", "")))
    if kind in ("reasoning", "thinking"):
        return _wrap("think", str(part.get("value", part.get(kind, ""))))
    if kind == "tool_call":
        return _wrap("tool_call", to_text(part.get("value")))
    raise RowError(
        f"turn {number} holds a part of type {kind!r}; only text can be trained on. "
        "Remove the row or the part.",
        code="unsupported-content",
    )


def _render_call(call: Any, number: int) -> str:
    """One entry of OpenAI's ``tool_calls``; arguments come as an object or as JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RowError(
            f"turn {number} calls a tool as {str(call)[:40]!r}; needed is an object with a name "
            "and arguments. Rewrite it.",
            code="bad-turn",
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(orjson.JSONDecodeError):  # broken arguments are kept as they are
            arguments = orjson.loads(arguments)
    rendered = to_json({"name": function.get("name"), "arguments": arguments})
    return _wrap("tool_call", rendered)


def _wrap(tag: str, text: str) -> str:
    return text if f"<{tag}>" in text else f"<{tag}>\n{text.strip()}\n</{tag}>"


def with_system(turns: tuple[Turn, ...], system: str, tools: str) -> tuple[Turn, ...]:
    """The turns with a system prompt in front, unless they have their own, and with the tools.

    Args:
        system: used when the conversation has no system turn; may be empty.
        tools: JSON text of the functions that may be called; may be empty.
    """
    if turns and turns[0].role == "system":
        system, turns = turns[0].content, turns[1:]
    if tools:
        listed = f"# Tools\n\nYou may call these functions.\n\n<tools>\n{tools}\n</tools>"
        system = f"{system}\n\n{listed}" if system else listed
    if is_blank(system):
        return turns
    return (Turn(role="system", content=system), *turns)


def tools_to_text(tools: Any) -> str:
    """The ``tools`` field of a row as JSON text; empty when there are none."""
    if not tools:
        return ""
    text = tools.strip() if isinstance(tools, str) else to_json(tools)
    return "" if text in ("[]", "{}", "null") else text
