"""The HTTP face of an engine: OpenAI's routes, adapters by name, health and metrics.

    GET  /v1/models                 the base and its adapters
    POST /v1/chat/completions       messages in, an answer or a stream out
    POST /v1/completions            prompts in, answers or a stream out
    POST /v1/load_lora_adapter      {"lora_name", "lora_path"}; only under --adapter-root
    POST /v1/unload_lora_adapter    {"lora_name"}
    GET  /health                    200 while the engine takes requests
    GET  /metrics                   Prometheus' text format

Every error has OpenAI's shape, so that its clients raise their own exceptions.
The server listens on this machine only unless told otherwise, answers no foreign
Host header then, and never opens a path from a request outside one folder.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lorakeet.base.errors import DataError, LorakeetError, MachineError, RequestError
from lorakeet.serve import routes
from lorakeet.serve.adapter_store import ForbiddenPathError, UnknownModelError
from lorakeet.serve.engine import Engine, EngineLimits, PromptTooLongError
from lorakeet.serve.metrics import CountResponses, ResponseCounts
from lorakeet.serve.protocol import build_error
from lorakeet.serve.scheduler import QueueFullError

GRACE_S = 5
MAX_CONNECTIONS = 512


def build_app(engine: Engine, settings: routes.AppSettings | None = None) -> FastAPI:
    """An ASGI application over an engine, which stays the caller's to close."""
    settings = settings or routes.AppSettings()
    app = FastAPI(title="Lorakeet", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engine = engine
    app.state.settings = settings
    app.state.responses = ResponseCounts()
    if settings.allowed_hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.allowed_hosts))
    app.add_middleware(CountResponses, counts=app.state.responses)
    app.add_exception_handler(LorakeetError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_api_route("/v1/models", routes.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", routes.show_model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", routes.answer_chat, methods=["POST"])
    app.add_api_route("/v1/completions", routes.answer_text, methods=["POST"])
    app.add_api_route("/v1/load_lora_adapter", routes.load_adapter, methods=["POST"])
    app.add_api_route("/v1/unload_lora_adapter", routes.unload_adapter, methods=["POST"])
    app.add_api_route("/health", routes.tell_health, methods=["GET"])
    app.add_api_route("/metrics", routes.tell_metrics, methods=["GET"])
    return app


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server in the background; as text it is its address.

    Args:
        address: such as ``http://127.0.0.1:40123``.
    """

    address: str
    engine: Engine

    @property
    def url(self) -> str:
        """What OpenAI's clients call ``base_url``."""
        return f"{self.address}/v1"

    def __str__(self) -> str:
        return self.address


def run_server(
    base: str,
    adapters: Mapping[str, Path],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    adapter_root: Path | None = None,
    limits: EngineLimits | None = None,
) -> None:
    """Serves until Ctrl-C or SIGTERM; answers in flight get five seconds to end.

    Args:
        adapters: name in the ``model`` field of a request -> adapter folder.
        adapter_root: adapters below it may be loaded over HTTP; None for none.

    Raises:
        MachineError: the port is in use or may not be opened.
        FileFormatError: an adapter is damaged or does not fit the base.
    """
    with _open_socket(host, port) as listener:
        engine = Engine(base, adapters, limits=limits)
        try:
            settings = _build_settings(host, adapter_root)
            _build_server(engine, settings).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn has ended in order and passes the signal on
            return
        finally:
            engine.close()


@contextmanager
def start_background_server(
    base: str,
    adapters: Mapping[str, Path] | None = None,
    *,
    adapter_root: Path | None = None,
    limits: EngineLimits | None = None,
) -> Iterator[RunningServer]:
    """A server on a free port of this machine for as long as the ``with`` block runs.

    Raises:
        MachineError: it did not come up within 30 s.
        FileFormatError: an adapter is damaged or does not fit the base.
    """
    with _open_socket("127.0.0.1", 0) as listener:
        engine = Engine(base, adapters or {}, limits=limits)
        server = _build_server(engine, _build_settings("127.0.0.1", adapter_root))
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="lorakeet-http", daemon=True
        )
        thread.start()
        try:
            _wait_until_started(server, thread)
            port = listener.getsockname()[1]
            yield RunningServer(address=f"http://127.0.0.1:{port}", engine=engine)
        finally:
            server.should_exit = True
            engine.close()
            thread.join(timeout=GRACE_S + 5)


def _open_socket(host: str, port: int) -> socket.socket:
    """A bound socket, taken before the model loads, so that a busy port is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it each answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere the option would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise MachineError(
            f"Port {port} on {host} cannot be opened ({reason}). Choose a free one with --port, "
            "or stop the program that uses it."
        ) from error
    return listener


def _build_settings(host: str, adapter_root: Path | None) -> routes.AppSettings:
    """On a loopback address only loopback names are answered, against DNS rebinding."""
    allowed = ("localhost", "127.0.0.1") if host in ("localhost", "127.0.0.1") else ()
    return routes.AppSettings(adapter_root=adapter_root, allowed_hosts=allowed)


def _build_server(engine: Engine, settings: routes.AppSettings) -> uvicorn.Server:
    config = uvicorn.Config(
        build_app(engine, settings),
        log_level="warning",
        lifespan="off",
        timeout_keep_alive=10,
        timeout_graceful_shutdown=GRACE_S,
        limit_concurrency=MAX_CONNECTIONS,
    )
    return uvicorn.Server(config)


def _wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + 30
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise MachineError("The server did not start within 30 s. See the lines above.")
        time.sleep(0.01)


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    """An expected failure in OpenAI's shape."""
    if isinstance(error, routes.BodyError):
        return JSONResponse(build_error(str(error), "invalid_request_error"), error.status)
    if isinstance(error, UnknownModelError):
        body = build_error(str(error), "invalid_request_error", code="model_not_found")
        return JSONResponse(body, 404)
    if isinstance(error, ForbiddenPathError):
        return JSONResponse(build_error(str(error), "permission_error"), 403)
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(error.retry_after_s)}
        body = build_error(str(error), "rate_limit_error", code="queue_full")
        return JSONResponse(body, 429, headers)
    if isinstance(error, PromptTooLongError):
        body = build_error(str(error), "invalid_request_error", code="context_length_exceeded")
        return JSONResponse(body, 400)
    if isinstance(error, (RequestError, DataError)):
        return JSONResponse(build_error(str(error), "invalid_request_error"), 400)
    return JSONResponse(build_error(str(error), "server_error"), 503)


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    """An unknown route or method in OpenAI's shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else "the server failed"
    message = f"{detail}. The routes are /v1/models, /v1/chat/completions and /v1/completions."
    return JSONResponse(build_error(message, "invalid_request_error"), status)
