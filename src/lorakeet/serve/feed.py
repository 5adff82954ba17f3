"""From the worker's thread to the event loop: the events of one HTTP request.

A request may have several prompts, so a feed has several tickets; each event
carries the number of its choice.  When the client closes its connection, or the
reader stops early, all tickets are cancelled and their places become free.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request

from lorakeet.base.errors import LorakeetError
from lorakeet.base.records import Completion
from lorakeet.serve.engine import Engine
from lorakeet.serve.protocol import build_envelope, build_error, build_usage, to_finish_reason
from lorakeet.serve.ticket import Event, Failed, Finished, Job, TextPiece, Ticket


class Feed:
    """Submits the jobs of one HTTP request and yields their events.

    Args:
        jobs: one for each choice of the answer.
        request: watched for the client's leaving; its body must have been read.

    Raises:
        LorakeetError: a job was refused; none of the others goes on.
    """

    def __init__(self, engine: Engine, jobs: Sequence[Job], request: Request) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        try:
            for index, job in enumerate(jobs):
                self._tickets.append(engine.submit(job, partial(self._put, index)))
        except LorakeetError:
            self.cancel()
            raise
        self._watcher = asyncio.create_task(self._watch(request))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Choice numbers and events, until each choice has ended."""
        num_open = len(self._tickets)
        try:
            while num_open:
                index, event = await self._events.get()
                num_open -= not isinstance(event, TextPiece)
                yield index, event
        finally:
            self._watcher.cancel()
            self.cancel()

    async def collect(self) -> list[Completion]:
        """All whole answers, in the order of the jobs.

        Raises:
            LorakeetError: one of them failed.
        """
        completions: dict[int, Completion] = {}
        async for index, event in self.events():
            if isinstance(event, Failed):
                self.cancel()
                raise event.error
            if isinstance(event, Finished):
                completions[index] = event.completion
        return [completions[index] for index in range(len(self._tickets))]

    def cancel(self) -> None:
        """Frees the places of all tickets; harmless for those that have ended."""
        for ticket in self._tickets:
            ticket.cancel()

    def _put(self, index: int, event: Event) -> None:
        """Called by the worker."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:  # the loop is closed: the server is going down, nobody reads
            return

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.cancel()


async def stream_chat(feed: Feed, head: tuple[str, str], with_usage: bool) -> AsyncIterator[bytes]:
    """A chat answer as server-sent events: a role, deltas, a finish reason, [DONE].

    Args:
        head: the request's id and the model's name.
    """
    envelope = build_envelope("chat.completion.chunk", *head)
    yield _to_event(envelope, [_chat_choice({"role": "assistant", "content": ""}, None)])
    completions: list[Completion] = []
    async for _, event in feed.events():
        if isinstance(event, TextPiece):
            yield _to_event(envelope, [_chat_choice({"content": event.text}, None)])
        elif isinstance(event, Finished):
            completions.append(event.completion)
            yield _to_event(envelope, [_chat_choice({}, to_finish_reason(event.completion))])
        else:
            yield _to_error_event(event)
    for piece in _ending(envelope, completions, with_usage):
        yield piece


async def stream_text(feed: Feed, head: tuple[str, str], with_usage: bool) -> AsyncIterator[bytes]:
    """Text completions as server-sent events; choices of several prompts interleave."""
    envelope = build_envelope("text_completion", *head)
    completions: list[Completion] = []
    async for index, event in feed.events():
        if isinstance(event, TextPiece):
            yield _to_event(envelope, [_text_choice(index, event.text, None)])
        elif isinstance(event, Finished):
            completions.append(event.completion)
            reason = to_finish_reason(event.completion)
            yield _to_event(envelope, [_text_choice(index, "", reason)])
        else:
            yield _to_error_event(event)
    for piece in _ending(envelope, completions, with_usage):
        yield piece


def build_chat_answer(completions: list[Completion], head: tuple[str, str]) -> dict[str, Any]:
    """A whole chat answer."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": None,
            "finish_reason": to_finish_reason(completion),
        }
        for index, completion in enumerate(completions)
    ]
    envelope = build_envelope("chat.completion", *head)
    return {**envelope, "choices": choices, "usage": build_usage(completions)}


def build_text_answer(completions: list[Completion], head: tuple[str, str]) -> dict[str, Any]:
    """Whole text completions, one choice a prompt."""
    choices = [
        _text_choice(index, completion.text, to_finish_reason(completion))
        for index, completion in enumerate(completions)
    ]
    envelope = build_envelope("text_completion", *head)
    return {**envelope, "choices": choices, "usage": build_usage(completions)}


def _chat_choice(delta: dict[str, str], reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


def _text_choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _to_event(envelope: dict[str, Any], choices: list[dict[str, Any]], **fields: Any) -> bytes:
    return b"data: " + orjson.dumps({**envelope, "choices": choices, **fields}) + b"\n\n"


def _to_error_event(event: Failed) -> bytes:
    return b"data: " + orjson.dumps(build_error(str(event.error), "server_error")) + b"\n\n"


def _ending(
    envelope: dict[str, Any], completions: list[Completion], with_usage: bool
) -> list[bytes]:
    """The usage chunk, if it was asked for, and the mark that ends a stream."""
    usage = [_to_event(envelope, [], usage=build_usage(completions))] if with_usage else []
    return [*usage, b"data: [DONE]\n\n"]
