"""What each route does: a body becomes jobs, the engine's events become an answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from lorakeet.base.errors import RequestError
from lorakeet.infer.sampling import SamplingSettings
from lorakeet.serve.adapter_store import ForbiddenPathError, UnknownModelError, find_folder_under
from lorakeet.serve.engine import Engine
from lorakeet.serve.feed import (
    Feed,
    build_chat_answer,
    build_text_answer,
    stream_chat,
    stream_text,
)
from lorakeet.serve.metrics import build_metrics
from lorakeet.serve.protocol import (
    ChatRequest,
    LoadAdapterRequest,
    TextRequest,
    UnloadAdapterRequest,
    read_body,
)
from lorakeet.serve.ticket import Job

B = TypeVar("B", bound=BaseModel)
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
MAX_SEED = 2**31


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """What the HTTP layer allows.

    Args:
        adapter_root: adapters below it may be loaded over HTTP; None for none.
        allowed_hosts: accepted Host headers, against DNS rebinding; empty for any.
        body_timeout_s: a body that takes longer to arrive is given up.
    """

    adapter_root: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 2 * 1024**2
    body_timeout_s: float = 30.0


class BodyError(RequestError):
    """A body was not read: too long, too slow or of another type.

    Args:
        status: the HTTP status that says so.
    """

    def __init__(self, status: HTTPStatus, message: str) -> None:
        self.status = status
        super().__init__(message)


async def list_models(request: Request) -> JSONResponse:
    """The base and the adapters; an adapter's ``parent`` is the base."""
    return JSONResponse({"object": "list", "data": _describe_models(_engine_of(request))})


async def show_model(request: Request, name: str) -> JSONResponse:
    """One entry of the list.

    Raises:
        UnknownModelError: nothing is called that.
    """
    models = _describe_models(_engine_of(request))
    for model in models:
        if model["id"] == name:
            return JSONResponse(model)
    known = ", ".join(model["id"] for model in models)
    raise UnknownModelError(f"There is no model '{name[:80]}'. Loaded are: {known}.")


async def answer_chat(request: Request) -> Response:
    """The assistant's next turn, whole or as a stream."""
    engine = _engine_of(request)
    asked = await _receive(ChatRequest, request)
    turns = [message.to_turn() for message in asked.messages]
    prompt = await run_in_threadpool(engine.encode_chat, turns)
    feed = Feed(engine, [_to_job(asked, prompt, engine)], request)
    head = (f"chatcmpl-{uuid.uuid4().hex}", asked.model)
    if asked.stream:
        events = stream_chat(feed, head, asked.wants_usage_chunk)
        return StreamingResponse(events, media_type="text/event-stream", headers=SSE_HEADERS)
    return JSONResponse(build_chat_answer(await feed.collect(), head))


async def answer_text(request: Request) -> Response:
    """Continuations of one or several prompts, whole or as a stream."""
    engine = _engine_of(request)
    asked = await _receive(TextRequest, request)
    jobs = []
    for prompt in asked.prompts:
        is_text = isinstance(prompt, str)
        ids = await run_in_threadpool(engine.encode_text, prompt) if is_text else tuple(prompt)
        jobs.append(_to_job(asked, ids, engine))
    feed = Feed(engine, jobs, request)
    head = (f"cmpl-{uuid.uuid4().hex}", asked.model)
    if asked.stream:
        events = stream_text(feed, head, asked.wants_usage_chunk)
        return StreamingResponse(events, media_type="text/event-stream", headers=SSE_HEADERS)
    return JSONResponse(build_text_answer(await feed.collect(), head))


async def load_adapter(request: Request) -> JSONResponse:
    """Loads a folder under the adapter root; a name that exists gets the new version."""
    engine = _engine_of(request)
    asked = await _receive(LoadAdapterRequest, request)
    engine.store.check_name(asked.lora_name)
    root = request.app.state.settings.adapter_root
    folder = await run_in_threadpool(find_folder_under, root, asked.lora_path)
    version = await run_in_threadpool(engine.load_adapter, asked.lora_name, folder)
    return JSONResponse({"status": "loaded", "id": asked.lora_name, "version": version.digest})


async def unload_adapter(request: Request) -> JSONResponse:
    """Takes an adapter's name away; its requests in flight end undisturbed."""
    asked = await _receive(UnloadAdapterRequest, request)
    if request.app.state.settings.adapter_root is None:
        raise ForbiddenPathError(
            "This server's adapters are fixed. Start it with --adapter-root FOLDER to change them "
            "over HTTP."
        )
    await run_in_threadpool(_engine_of(request).unload_adapter, asked.lora_name)
    return JSONResponse({"status": "unloaded", "id": asked.lora_name})


async def tell_health(request: Request) -> JSONResponse:
    """200 while requests are taken, else 503."""
    is_open = not _engine_of(request).is_closed
    return JSONResponse({"status": "ok" if is_open else "closing"}, 200 if is_open else 503)


async def tell_metrics(request: Request) -> PlainTextResponse:
    """Counters and gauges for Prometheus."""
    text = build_metrics(_engine_of(request), request.app.state.responses)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _receive(kind: type[B], request: Request) -> B:
    """The body of a request as a record, within the limits of size and time."""
    settings: AppSettings = request.app.state.settings
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        # A browser sends JSON across origins only after asking, so foreign pages stay out.
        raise BodyError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"The body's type is '{media_type[:60]}'. Send it with Content-Type: application/json.",
        )
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > settings.max_body_bytes:
                    raise BodyError(
                        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                        f"The body is longer than {settings.max_body_bytes:,} bytes. Shorten it.",
                    )
    except TimeoutError as error:
        raise BodyError(
            HTTPStatus.REQUEST_TIMEOUT,
            f"The body did not arrive within {settings.body_timeout_s:.0f} s. Send it again.",
        ) from error
    except ClientDisconnect as error:
        raise BodyError(HTTPStatus.BAD_REQUEST, "The client left before its body came.") from error
    return await run_in_threadpool(read_body, kind, bytes(body))


def _to_job(asked: ChatRequest | TextRequest, prompt: Sequence[int], engine: Engine) -> Job:
    """A checked body and its prompt as the engine's job; OpenAI's defaults fill the gaps."""
    seed = uuid.uuid4().int if asked.seed is None else asked.seed
    sampling = SamplingSettings(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k or 0,
        max_new_tokens=asked.max_new_tokens or engine.limits.default_new_tokens,
        stop=asked.stop,
        seed=seed % MAX_SEED,
    )
    return Job(model=asked.model, prompt=tuple(prompt), sampling=sampling)


def _describe_models(engine: Engine) -> list[dict[str, Any]]:
    base = engine.store.base_names[0]
    entry = {"object": "model", "created": engine.started_at, "owned_by": "lorakeet", "root": base}
    adapters = [
        {"id": name, **entry, "parent": base, "version": version.digest}
        for name, version in engine.store.adapters.items()
    ]
    return [{"id": base, **entry, "parent": None}, *adapters]


def _engine_of(request: Request) -> Engine:
    return request.app.state.engine
