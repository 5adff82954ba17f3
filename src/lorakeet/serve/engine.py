"""The one owner of the model: takes jobs from any thread, answers them on a single worker.

    any thread        submit ──> Scheduler (waiting)
    worker thread     chores (attach, detach) ──> take_batch ──> switch adapter ──> generate

PyTorch modules are not safe to change while another thread runs them, so one worker does
all that touches weights: forward passes, attaching, detaching and switching.  A batch shares
one adapter, which keeps the forward pass that of plain LoRA, and no neighbour's weights reach
a request's numbers.  The price is that mixed traffic takes turns by adapter.

Guarantees:
    greedy answers of mixed, concurrent requests equal isolated ones;
    a request gets one adapter version from its first token to its last;
    each submitted request ends in exactly one Finished or Failed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorakeet.base.errors import LorakeetError, MachineError, RequestError
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.records import Completion, Turn
from lorakeet.infer.generate import encode_prompt, generate
from lorakeet.infer.prompts import encode_plain
from lorakeet.models.base_hash import check_adapter
from lorakeet.models.load import load_model
from lorakeet.models.templates import adopt_template
from lorakeet.models.trained_form import read_trained_form
from lorakeet.serve.adapter_store import AdapterStore, AdapterVersion
from lorakeet.serve.residents import Residents
from lorakeet.serve.scheduler import BatchLimits, Scheduler
from lorakeet.serve.ticket import Failed, Finished, Job, Sink, TextPiece, Ticket
from lorakeet.serve.worker import Worker


class PromptTooLongError(RequestError):
    """The prompt leaves no room for an answer in the model's window."""


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What one request may use, how requests share the worker, and the bits of the base.

    Args:
        default_new_tokens: length of an answer when the request is silent.
        max_new_tokens: longer wishes are clamped to it.
        quantization: how the base is held; None holds it as the adapters were trained.
        other_base: whether adapters of a base with other weights are taken too.
    """

    default_new_tokens: int = 512
    max_new_tokens: int = 4096
    batch: BatchLimits = field(default_factory=BatchLimits)
    quantization: QuantizationSettings | None = None
    other_base: bool = False


@dataclass
class EngineCounts:
    """Totals since the start, for ``/metrics``; written by the worker only."""

    requests: int = 0
    failures: int = 0
    batches: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    busy_s: float = 0.0


class Engine:
    """A base model with its adapters, ready to answer.

    Args:
        base: a folder, a Hub id or ``starter``.
        adapters: name -> folder, loaded before the first request.

    Raises:
        FileFormatError: an adapter is damaged or does not fit the base.
        DataError: an adapter was trained on another base.
        RequestError: an adapter's name is malformed or the base's own.
    """

    def __init__(
        self,
        base: str,
        adapters: Mapping[str, Path] | None = None,
        *,
        limits: EngineLimits | None = None,
    ) -> None:
        self.limits = limits or EngineLimits()
        shown = Path(base).resolve().name if Path(base).is_dir() else base
        self.store = AdapterStore(tuple(dict.fromkeys((shown, base))))
        form = self.limits.quantization or read_trained_form((adapters or {}).values())
        check = partial(check_adapter, base=None if self.limits.other_base else base, held=form)
        for folder in (adapters or {}).values():
            check(Path(folder))  # before the base is loaded, which takes longer
        self.model, self.tokenizer = load_model(base, quantization=form)
        self.model.eval()
        self.window_tokens = int(getattr(self.model.config, "max_position_embeddings", 0) or 2**20)
        self.num_embeddings = int(self.model.get_input_embeddings().num_embeddings)
        self.counts = EngineCounts()
        self.scheduler = Scheduler(self.limits.batch)
        self._running: list[Ticket] = []
        self._tokenizer_lock = threading.Lock()
        self.started_at = int(time.time())
        self._worker = Worker(self._work, self._fail_running)
        self._residents = Residents(self.model, self.store, self._worker, check)
        try:
            for name, folder in (adapters or {}).items():
                self.load_adapter(name, Path(folder))
        except LorakeetError:
            self.close()
            raise

    @property
    def is_closed(self) -> bool:
        """Whether no more requests are taken."""
        return self._worker.is_closed

    @property
    def num_running(self) -> int:
        """Requests in the batch that is being answered."""
        return len(self._running)

    def encode_chat(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant's next turn.

        Raises:
            RequestError: the base's chat template refuses this order of turns.
        """
        with self._tokenizer_lock:
            return tuple(encode_prompt(self.tokenizer, turns))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text as the tokenizer begins one, without an EOS that would end it."""
        with self._tokenizer_lock:
            return tuple(encode_plain(self.tokenizer, text))

    def submit(self, job: Job, sink: Sink) -> Ticket:
        """Queues a job and returns at once; the answer comes to ``sink``.

        Raises:
            UnknownModelError: no such base or adapter.
            PromptTooLongError: the prompt fills the window.
            QueueFullError: too many requests wait.
            MachineError: the engine is closed.
        """
        job = self._fit(job)
        ticket = Ticket(job, self.store.acquire(job.model), sink, self._worker.call)
        pace = self.counts.busy_s / max(1, self.counts.requests)
        try:
            self.scheduler.submit(ticket, seconds_per_request=pace or 1.0)
        except LorakeetError:
            self._residents.release(ticket.version)
            raise
        if not self._worker.call():
            raise MachineError("The engine is closed. Start it again before asking.")
        return ticket

    def stream(self, job: Job) -> Iterator[str]:
        """The answer piece by piece; leaving the loop early cancels the job.

        Raises:
            LorakeetError: whatever ``submit`` raises, or the answer failed.
        """
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        ticket = self.submit(job, events.put)
        try:
            while isinstance(event := events.get(), TextPiece):
                yield event.text
            if isinstance(event, Failed):
                raise event.error
        finally:
            ticket.cancel()

    def complete(self, job: Job) -> Completion:
        """The whole answer; waits for it.

        Raises:
            LorakeetError: whatever ``submit`` raises, or the answer failed.
        """
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.submit(job, events.put)
        while isinstance(event := events.get(), TextPiece):
            pass
        if isinstance(event, Failed):
            raise event.error
        return event.completion

    def load_adapter(self, name: str, folder: Path) -> AdapterVersion:
        """Reads an adapter and points the name to it; waits until it can be asked for.

        Requests in flight under the same name keep the version they hold.

        Raises:
            FileFormatError: the folder is damaged or does not fit the base.
            MismatchError: the folder changed while it was read.
            RequestError: another adapter gave a base without a chat template a different one.
        """
        with self._tokenizer_lock:
            adopt_template(self.tokenizer, folder)
        return self._residents.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Takes the name away at once; the weights go when their last request has ended.

        Raises:
            UnknownModelError: no adapter is called that.
        """
        self._residents.unload(name)

    def close(self) -> None:
        """Cancels what runs, fails what waits and stops the worker; safe to repeat."""
        self._worker.is_closed = True
        for ticket in [*self.scheduler.take_all(), *self._running]:
            ticket.cancel()
            ticket.finish(Failed(error=MachineError("The server is closing. Ask again later.")))
        self._worker.close()

    def _fit(self, job: Job) -> Job:
        """The job with its answer clamped to the window and to the server's limit."""
        num_prompt = len(job.prompt)
        if num_prompt == 0:
            raise RequestError("The prompt is empty; at least one token is needed.")
        if num_prompt >= self.window_tokens:
            raise PromptTooLongError(
                f"The prompt has {num_prompt:,} tokens and the model's window is "
                f"{self.window_tokens:,} with the answer. Shorten the prompt."
            )
        largest = max(job.prompt)
        if largest >= self.num_embeddings or min(job.prompt) < 0:
            raise RequestError(
                f"The prompt holds token {largest}; ids run from 0 to {self.num_embeddings - 1}."
            )
        room = min(self.limits.max_new_tokens, self.window_tokens - num_prompt)
        length = min(job.sampling.max_new_tokens, room)
        return replace(job, sampling=replace(job.sampling, max_new_tokens=length))

    def _work(self) -> None:
        for ticket in self.scheduler.take_cancelled():
            self._end(ticket, Finished(completion=_empty_completion(ticket)))
        batch = self.scheduler.take_batch()
        if batch:
            self._answer(batch)

    def _answer(self, batch: list[Ticket]) -> None:
        """One batch through the model, and each of its tickets to its end."""
        self._running = batch
        begin = time.monotonic()
        self._residents.switch_to(batch[0].version)
        completions = generate(
            self.model,
            self.tokenizer,
            [ticket.job.prompt for ticket in batch],
            [ticket.job.sampling for ticket in batch],
            on_text=lambda row, text: batch[row].send_text(text),
            cancelled=lambda: {row for row, ticket in enumerate(batch) if ticket.is_cancelled},
        )
        self.counts.batches += 1
        self.counts.busy_s += time.monotonic() - begin
        for ticket, completion in zip(batch, completions, strict=True):
            self.counts.prompt_tokens += completion.num_prompt_tokens
            self.counts.completion_tokens += completion.num_completion_tokens
            self._end(ticket, Finished(completion=completion))
        self._running = []

    def _fail_running(self, error: BaseException) -> None:
        """Turns a crash of the worker's round into the failure of its requests only."""
        batch, self._running = self._running, []
        self.counts.failures += max(1, len(batch))  # a chore fails without a batch
        if not isinstance(error, LorakeetError):
            error = MachineError(
                f"The model failed on this request ({type(error).__name__}: {error}). "
                "Shorten the prompt or the answer; other requests are not affected."
            )
        for ticket in batch:
            self._end(ticket, Failed(error=error))

    def _end(self, ticket: Ticket, event: Finished | Failed) -> None:
        if ticket.finish(event):
            self.counts.requests += 1
            self._residents.release(ticket.version)


def _empty_completion(ticket: Ticket) -> Completion:
    """The answer of a request whose sender left before its turn."""
    return Completion(
        text="",
        num_prompt_tokens=ticket.num_prompt_tokens,
        num_completion_tokens=0,
        finish_reason="cancelled",
    )
