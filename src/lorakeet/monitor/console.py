"""The run in the terminal: a bar while steps are made, a line for everything that matters.

On a terminal the bar moves; in a file or pipe each tenth of the run is one line.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorakeet.base.units import to_readable_count, to_readable_seconds

LINES_PER_RUN = 10
STAGE_WORDS = {
    "data": "reading and cleaning data",
    "widths": "ranking layers for mixed widths",
    "plan": "planning",
    "load": "loading the base model",
    "train": "training",
    "evaluate": "evaluating base and tuned model",
    "merge": "merging, and verifying from disk in a fresh process",
    "serve": "asking over HTTP",
}


class RunConsole:
    """A sink that shows a run; use it as a context manager.

    Args:
        console: where to write; standard error by default, so that ``--json`` output
            stays alone on standard output.
        is_quiet: show alarms only.
    """

    def __init__(self, console: Console | None = None, *, is_quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.is_quiet = is_quiet
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> RunConsole:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Hears one event."""
        show = getattr(self, f"_show_{kind}", None)
        if show is not None and (not self.is_quiet or kind == "alarm"):
            show(fields)

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def _show_stage_started(self, fields: dict[str, Any]) -> None:
        self._end_bar()
        self._line(f"[bold cyan]>[/] {STAGE_WORDS.get(fields['stage'], fields['stage'])}")

    def _show_stage_finished(self, fields: dict[str, Any]) -> None:
        self._end_bar()
        self._line(f"  [dim]{fields['stage']} took {to_readable_seconds(fields['duration_s'])}[/]")

    def _show_data_report(self, fields: dict[str, Any]) -> None:
        tokens = fields["tokens"]
        self._line(
            f"  {fields['num_train']:,} samples to train on, {fields['num_validation']:,} to "
            f"validate, {fields['num_dropped']:,} rows dropped; "
            f"{to_readable_count(tokens['total'])} tokens, "
            f"{100 * tokens['trained_fraction']:.0f} % of them trained"
        )
        for warning in fields["warnings"]:
            self._line(f"  [yellow]note[/] {escape(warning)}")

    def _show_plan(self, fields: dict[str, Any]) -> None:
        self._line(f"  method: {fields['chosen']}{_tell_shared(fields)}")
        if trial := fields.get("trial"):
            word = "trial steps first" if trial["is_made"] else "no trial steps"
            self._line(f"  {word}: {escape(trial['why'])}")

    def _show_path(self, fields: dict[str, Any]) -> None:
        units = ", ".join(f"{count} x {name}" for name, count in fields["units"].items())
        packing = "samples packed end to end" if fields["packing"] else "samples padded"
        packing += _tell_shared(fields)
        self._line(f"  path: {packing}; fast units: {units or 'none'}")
        if fields.get("device", "cpu") != "cpu":
            attention = fields["attention"]
            self._line(
                f"  on {fields['device']}: kernels of {fields['kernels']}; attention "
                f"{attention['way']}: {escape(attention['why'])}"
            )

    def _show_frozen_cache(self, fields: dict[str, Any]) -> None:
        if fields["is_on"]:
            self._line(f"  frozen layers: {fields['reason']}")

    def _show_step(self, fields: dict[str, Any]) -> None:
        step, total = fields["step"], fields["num_steps"]
        figures = (
            f"loss {fields['loss']:.3f}  rate {fields['learning_rate']:.1e}  "
            f"{fields['tokens_per_s']:,.0f} tokens/s"
        )
        if self.console.is_terminal:
            if self._bar is None:
                self._start_bar(total)
            self._bar.update(self._task, completed=step, figures=figures)
        elif step == 1 or step == total or step % max(1, total // LINES_PER_RUN) == 0:
            self._line(f"  step {step}/{total}  {figures}")

    def _show_evaluation(self, fields: dict[str, Any]) -> None:
        values = "  ".join(f"{name} {value:.4g}" for name, value in fields["values"].items())
        self._line(f"  [green]validation[/] at step {fields['step']}: {values}")

    def _show_sample_answers(self, fields: dict[str, Any]) -> None:
        for prompt, answer in fields["answers"]:
            self._line(f"  [dim]{escape(prompt)}[/] {escape(answer.strip() or '(empty)')}")

    def _show_alarm(self, fields: dict[str, Any]) -> None:
        message, step = fields["message"], fields.get("step")
        where = f" at step {step}" if step and not message.startswith(f"step {step}:") else ""
        self._line(f"  [bold yellow]alarm[/] {fields['code']}{where}: {escape(message)}")

    def _show_remote_code(self, fields: dict[str, Any]) -> None:
        names = escape(", ".join(fields["files"]))
        self._line(f"  [bold yellow]trusted[/] the base's own code runs: {names}")

    def _show_early_stop(self, fields: dict[str, Any]) -> None:
        self._line(f"  [green]stopped early[/]: {escape(fields['reason'])}")

    def _show_proof(self, fields: dict[str, Any]) -> None:
        word = "[green]proved[/]" if fields["passed"] else "[bold red]FAILED[/]"
        self._line(f"  {word}: {fields['name']}")

    def _start_bar(self, total: int) -> None:
        self._bar = Progress(
            TextColumn(" "), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
            console=self.console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=total, figures="")
        self._bar.start()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _tell_shared(fields: dict[str, Any]) -> str:
    """How much less is computed, as samples share openings.

    >>> _tell_shared({"saved_fraction": 0.38}), _tell_shared({})
    ('; 38 % of tokens are shared, so 1.6x as fast', '')
    """
    saved = fields.get("saved_fraction") or 0.0
    return f"; {100 * saved:.0f} % of tokens are shared, so {1 / (1 - saved):.1f}x as fast" * (
        saved > 0
    )
