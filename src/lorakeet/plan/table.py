"""The plan as a table for the terminal, readable at 80 columns."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorakeet.base.units import to_percent, to_readable_bytes, to_readable_count
from lorakeet.plan.choose import MethodPlan, Plan

_COLUMNS = ("trained", "weights", "optimizer", "activations", "total", "tok/s", "fits")
_NOTE = (
    "Predictions. optimizer: adapter, gradients and moments; tok/s: tokens a second, on a GPU "
    "from its data sheet; (yes): it would fit, but this version does not train it."
)


def render_plan(plan: Plan) -> RenderableType:
    """Machine, model, a row a method, reasons, advice and the method that is chosen."""
    machine, facts = plan.hardware, plan.facts
    top = Text(
        f"{machine.name}, {to_readable_bytes(machine.usable_bytes)} free; {facts.model_type} with "
        f"{to_readable_count(facts.parameters)} parameters in {facts.layers} layers"
    )
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for method in plan.methods:
        style = "bold green" if method.kind == plan.chosen else ""
        table.add_row(*_to_cells(method), style=style)
    reasons = [Text(f"{method.kind}: {method.why}", style="dim") for method in plan.methods]
    advice = [Text(f"advice: {line}", style="yellow") for line in (*plan.remedies, *plan.advice)]
    chosen = Text(f"chosen: {plan.chosen or 'none, see the advice'}", style="bold")
    return Group(top, table, *reasons, Text(_NOTE, style="dim"), *advice, chosen)


def _to_cells(method: MethodPlan) -> list[str]:
    """One row of the table."""
    memory = method.memory
    kept = memory.adapter + memory.gradients + memory.optimizer
    sizes = (memory.weights, kept, memory.activations, memory.total)
    fits = "no" if not method.fits else "yes" if method.is_trainable else "(yes)"
    return [
        method.kind, to_percent(method.trained_fraction), *map(_to_short_bytes, sizes),
        _to_speed(method.tokens_per_s), fits,
    ]  # fmt: skip


def _to_short_bytes(num_bytes: int) -> str:
    """A size in at most eight letters, so that the table stays within 80 columns.

    >>> _to_short_bytes(27_000_000_000), _to_short_bytes(136_573_000_000), _to_short_bytes(5)
    ('25.1 GiB', '127 GiB', '5 B')
    """
    number, unit = to_readable_bytes(num_bytes).split()
    digits = 1 if "." in number and float(number) < 100 else 0
    return f"{float(number):.{digits}f} {unit}"


def _to_speed(tokens_per_s: float | None) -> str:
    """Tokens a second in at most six letters.

    >>> _to_speed(None), _to_speed(0.42), _to_speed(11227.3), _to_speed(1.5e5)
    ('-', '0.4', '11,227', '150K')
    """
    if tokens_per_s is None:
        return "-"
    if tokens_per_s >= 1e5:
        return to_readable_count(tokens_per_s)
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.1f}"
