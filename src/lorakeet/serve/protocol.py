"""The shapes of OpenAI's HTTP interface, as far as this server speaks it.

A body is read into one of the records below.  Three rules decide about fields:

    known and supported     checked for type and range
    known, changes meaning  refused with a sentence (``n: 2``, ``tools``, ``logprobs``)
    unknown or harmless     passed over, as clients send many (``user``, ``store``)

Silence would be worse than a refusal: a client that asks for two answers and
gets one has a bug that nobody sees.

Source: https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lorakeet.base.errors import RequestError
from lorakeet.base.records import Completion, Turn

MAX_STOP_TEXTS = 16
MAX_PROMPTS = 16
B = TypeVar("B", bound=BaseModel)

# Fields that would change the answer, with the values that change nothing.
_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "response_format": ({"type": "text"},),
    "echo": (False,),
    "suffix": ("",),
    "audio": (),
    "modalities": (["text"],),
    "chat_template": (),
    "adapter_id": (),
    "lora": (),
}


class _Body(BaseModel):
    """A body from outside: strict about types, tolerant of names."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> _Body:
        for name, value in (self.model_extra or {}).items():
            if value is None or name not in _HARMLESS_VALUES:
                continue
            if not _is_one_of(value, _HARMLESS_VALUES[name]):
                raise ValueError(
                    f"{name} is {_shorten(value)}, which this server cannot do. Leave {name} "
                    "out; for several answers send several requests"
                )
        return self


class StreamOptions(BaseModel):
    """``include_usage`` asks for a last chunk with the token counts."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    include_usage: bool = False


def _to_texts(value: Any) -> Any:
    """One stop text or a list of them, or null, as a tuple."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


StopTexts = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
    BeforeValidator(_to_texts),
    Field(max_length=MAX_STOP_TEXTS),
]


class _Generation(_Body):
    """What both kinds of completion share."""

    model: str = Field(min_length=1, max_length=256)
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopTexts = ()
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def max_new_tokens(self) -> int | None:
        """The longest answer that was asked for, in tokens; None leaves it to the server."""
        return self.max_tokens


class TextPart(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a chat; content is a string or a list of text parts."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    def to_turn(self) -> Turn:
        """The message as the record that templates take; ``developer`` means system."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return Turn(role="system" if self.role == "developer" else self.role, content=text)


class ChatRequest(_Generation):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """``max_completion_tokens``, or its older name ``max_tokens``."""
        return self.max_completion_tokens or self.max_tokens


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class TextRequest(_Generation):
    """The body of ``POST /v1/completions``; a prompt is text or token ids, one or several."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, in the order of the answer's choices."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class LoadAdapterRequest(BaseModel):
    """The body of ``POST /v1/load_lora_adapter``, as vLLM names it."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    lora_name: str
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadAdapterRequest(BaseModel):
    """The body of ``POST /v1/unload_lora_adapter``."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    lora_name: str


def read_body(kind: type[B], body: bytes) -> B:
    """A body as a record.

    Raises:
        RequestError: it is not JSON, or fields have wrong types or values; the
            message lists all of them.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = {_to_sentence(problem) for problem in error.errors(include_url=False)}
        raise RequestError("; ".join(sorted(problems)[:8]) + ".") from error


def build_error(message: str, kind: str, *, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape, which its clients turn into exceptions."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def build_usage(completions: list[Completion]) -> dict[str, int]:
    """Token counts of a request over all its prompts."""
    prompt = sum(completion.num_prompt_tokens for completion in completions)
    answer = sum(completion.num_completion_tokens for completion in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }


def build_envelope(kind: str, request_id: str, model: str) -> dict[str, Any]:
    """The fields that every answer and every chunk begins with."""
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}


def to_finish_reason(completion: Completion) -> str:
    """``stop`` or ``length``; a cancelled answer has no reader and counts as stopped."""
    return "length" if completion.finish_reason == "length" else "stop"


def _is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Equality that tells True from 1."""
    is_bool = isinstance(value, bool)
    return any(value == item and is_bool == isinstance(item, bool) for item in harmless)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _to_sentence(problem: Any) -> str:
    """One mistake with the field it is in."""
    place = ".".join(str(part) for part in problem["loc"][:3])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason
