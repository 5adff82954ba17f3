"""Counters and gauges in Prometheus' text format, so that any dashboard can read them.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakeet.serve.engine import Engine

ResponseCounts = Counter[int]


class CountResponses:
    """ASGI middleware that counts answers by their HTTP status.

    Args:
        counts: grows by one an answer; the application keeps it.
    """

    def __init__(self, app: ASGIApp, counts: ResponseCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on and looks at the head of the answer."""

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counts[message["status"]] += 1
            await send(message)

        await self._app(scope, receive, send_counted)


def build_metrics(engine: Engine, responses: ResponseCounts) -> str:
    """All metrics as one text; names end in their unit, totals in ``_total``."""
    counts = engine.counts
    lines: list[str] = []
    for name, kind, meaning, value in (
        ("requests_total", "counter", "Answers that ended, cancelled ones too", counts.requests),
        ("failures_total", "counter", "Answers that the model could not give", counts.failures),
        ("batches_total", "counter", "Batches that ran", counts.batches),
        ("prompt_tokens_total", "counter", "Tokens read", counts.prompt_tokens),
        ("completion_tokens_total", "counter", "Tokens written", counts.completion_tokens),
        ("busy_seconds_total", "counter", "Time the model ran", round(counts.busy_s, 6)),
        ("waiting_requests", "gauge", "Requests in the queue", engine.scheduler.num_waiting),
        ("running_requests", "gauge", "Requests in the batch", engine.num_running),
        ("adapters", "gauge", "Adapters that can be asked for", len(engine.store.adapters)),
        ("resident_versions", "gauge", "Versions in memory", len(engine.store.resident)),
    ):
        lines += [
            f"# HELP lorakeet_{name} {meaning}.",
            f"# TYPE lorakeet_{name} {kind}",
            f"lorakeet_{name} {value}",
        ]
    lines += [
        "# HELP lorakeet_http_responses_total Answers by HTTP status.",
        "# TYPE lorakeet_http_responses_total counter",
        *(
            f'lorakeet_http_responses_total{{status="{status}"}} {number}'
            for status, number in sorted(responses.items())
        ),
    ]
    return "\n".join(lines) + "\n"
