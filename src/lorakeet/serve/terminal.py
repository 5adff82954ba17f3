"""A chat in the terminal: text as it is written, adapters switched between two turns.

    /base             talk to the bare base
    /adapter NAME     talk to an adapter
    /system TEXT      set the system prompt and begin anew; without TEXT, none
    /reset            begin anew
    /quit             leave; Ctrl-D does too, Ctrl-C stops an answer

The conversation stays when the model is switched, so that two adapters can be
asked the same thing one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lorakeet.base.errors import LorakeetError
from lorakeet.base.records import Turn
from lorakeet.infer.sampling import SamplingSettings
from lorakeet.serve.engine import Engine, EngineLimits
from lorakeet.serve.ticket import Job

HELP = "/base  /adapter NAME  /system TEXT  /reset  /quit"


@dataclass
class Chat:
    """One conversation with an engine.

    Args:
        model: the name that the next question goes to.
        turns: what has been said, the system prompt first.
    """

    engine: Engine
    model: str
    sampling: SamplingSettings
    turns: list[Turn] = field(default_factory=list)

    def answer(self, question: str, show: Callable[[str], None]) -> None:
        """Asks and shows the answer piece by piece; Ctrl-C keeps what has come so far.

        Raises:
            LorakeetError: the question cannot be answered; it is not kept.
        """
        turns = [*self.turns, Turn(role="user", content=question)]
        prompt = self.engine.encode_chat(turns)
        pieces: list[str] = []
        try:
            job = Job(model=self.model, prompt=prompt, sampling=self.sampling)
            for piece in self.engine.stream(job):
                pieces.append(piece)
                show(piece)
        except KeyboardInterrupt:
            show(" ...")
        self.turns = [*turns, Turn(role="assistant", content="".join(pieces))]

    def reset(self, system: str | None = None) -> None:
        """Forgets the conversation.

        Args:
            system: the new system prompt; None keeps the old one, "" drops it.
        """
        kept = [turn for turn in self.turns if turn.role == "system"]
        if system is not None:
            kept = [Turn(role="system", content=system)] if system else []
        self.turns = kept

    def switch_to(self, model: str) -> None:
        """Sends the next questions to another model.

        Raises:
            UnknownModelError: it is not loaded.
        """
        self.engine.store.look_up(model)
        self.model = model


def run_chat(
    base: str,
    adapters: Mapping[str, Path] | None = None,
    *,
    sampling: SamplingSettings | None = None,
    console: Console | None = None,
    limits: EngineLimits | None = None,
) -> None:
    """Talks until /quit or the end of the input.

    Args:
        adapters: name -> folder; the first one is asked at the beginning.
        sampling: greedy with at most 256 tokens when absent.

    Raises:
        LorakeetError: the base or an adapter cannot be loaded.
    """
    console = console or Console(highlight=False)
    engine = Engine(base, adapters, limits=limits)
    try:
        first = next(iter(adapters), None) if adapters else None
        sampling = sampling or SamplingSettings(max_new_tokens=256)
        chat = Chat(engine, first or engine.store.base_names[0], sampling)
        console.print(f"[dim]{escape(HELP)}[/dim]")
        while (line := _read_line(console, chat.model)) is not None:
            if line and not _take(line, chat, console):
                break
    finally:
        engine.close()


def _read_line(console: Console, model: str) -> str | None:
    """The next line without outer blanks, or None at the end of the input."""
    try:
        return console.input(f"[bold]{escape(model)}>[/bold] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _take(line: str, chat: Chat, console: Console) -> bool:
    """Obeys a command or answers a question; False when the user wants to leave."""
    try:
        if line.startswith("/"):
            return _obey(line, chat, console)
        chat.answer(line, lambda piece: console.print(piece, end="", markup=False))
        console.print()
    except LorakeetError as error:
        console.print(f"[red]{escape(str(error))}[/red]")
    return True


def _obey(line: str, chat: Chat, console: Console) -> bool:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command in ("/quit", "/exit"):
        return False
    if command == "/base":
        chat.switch_to(chat.engine.store.base_names[0])
    elif command == "/adapter" and argument:
        chat.switch_to(argument)
    elif command == "/system":
        chat.reset(system=argument)
    elif command == "/reset":
        chat.reset()
    else:
        names = ", ".join(chat.engine.store.names)
        console.print(f"[dim]{escape(HELP)}; loaded are {escape(names)}[/dim]")
    return True
