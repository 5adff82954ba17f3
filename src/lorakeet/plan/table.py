"""The plan as a table for the terminal, readable at 80 columns."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorakeet.base.units import (
    to_percent,
    to_readable_bytes,
    to_readable_count,
    to_readable_seconds,
)
from lorakeet.plan.choose import MethodPlan, Plan
from lorakeet.plan.sizes import CARDS_GIB, EXACT_FIRST, SizePlan

_COLUMNS = ("trained", "weights", "optimizer", "activations", "total", "tok/s", "fits")
_NOTE = (
    "Predictions. optimizer: adapter, gradients, moments and their copies; tok/s: tokens a "
    "second, on a GPU from its data sheet; (yes): it would fit, with names that are the model's."
)
_NOTE_SIZES = (
    "Predictions with a tenth of the card left free. Take the first that fits: 16-bit bases are "
    "exact, and 4 bits cost time and some accuracy (arXiv:2305.14314)."
)
_SHORT = {"lora-8bit": "8bit"}


def render_plan(plan: Plan) -> RenderableType:
    """Machine, model, a row a method, reasons, advice and the method that is chosen."""
    machine, facts = plan.hardware, plan.facts
    top = Text(
        f"{machine.name}, {to_readable_bytes(machine.usable_bytes)} free; {facts.model_type} with "
        f"{to_readable_count(facts.parameters)} parameters in {facts.layers} layers"
    )
    table = _table("method")
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for method in plan.methods:
        style = "bold green" if method.kind == plan.chosen else ""
        table.add_row(*_to_cells(method), style=style)
    reasons = [Text(f"{method.kind}: {method.why}", style="dim") for method in plan.methods]
    advice = [Text(f"advice: {line}", style="yellow") for line in (*plan.remedies, *plan.advice)]
    told = [_render_measured(plan.measured)] if plan.measured else []
    chosen = Text(f"chosen: {plan.chosen or 'none, see the advice'}", style="bold")
    costs = _render_costs(plan)
    notes = [Text(_NOTE, style="dim"), *_render_knobs(plan)]
    return Group(top, table, *reasons, *notes, *costs, *advice, *told, chosen)


def _render_knobs(plan: Plan) -> list[RenderableType]:
    """What one change would save, the largest first; nothing where nothing does."""
    if not plan.knobs:
        return []
    table = _table("one change to the recipe")
    table.add_column("saves", justify="right", no_wrap=True)
    for knob in plan.knobs:
        table.add_row(knob.setting, _to_short_bytes(knob.saved_bytes))
    return [table]


def _render_costs(plan: Plan) -> list[Text]:
    """A line a method with the price of a run, or of a million tokens, where a price is given."""
    lines = []
    for method in plan.methods:
        if method.cost is not None and method.run_s is not None:
            time = to_readable_seconds(method.run_s)
            lines.append(Text(f"cost of {method.kind}: {method.cost:,.2f} for a run of {time}"))
        elif method.cost_per_million_tokens is not None:
            price = method.cost_per_million_tokens
            lines.append(Text(f"cost of {method.kind}: {price:,.4g} for a million tokens"))
    return lines


def _render_measured(measured: dict[str, Any]) -> RenderableType:
    """Predicted, measured and their difference."""
    table = _table("measured")
    for column in ("predicted", "measured", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    peak, rate = measured["peak_bytes"], measured["predicted_tokens_per_s"]
    if peak:
        predicted = measured["predicted_bytes"]
        table.add_row("peak memory", _to_short_bytes(predicted), _to_short_bytes(peak),
                      f"{100 * (peak / predicted - 1):+.0f} %")  # fmt: skip
    found = measured["tokens_per_s"]
    off = f"{100 * (found / rate - 1):+.0f} %" if rate else "-"
    table.add_row("tok/s", _to_speed(rate), _to_speed(found), off)
    notes = [f"Timed steps: {measured['num_steps']}; the largest micro-batch had "
             f"{measured['longest_tokens']:,} tokens. At this rate the run takes "
             f"{to_readable_seconds(measured['run_s'])} without validation."]  # fmt: skip
    if measured["cost"] is not None:
        notes.append(f"It costs {measured['cost']:,.2f}.")
    return Group(table, Text(" ".join(notes)))


def render_sizes(sizes: list[SizePlan]) -> RenderableType:
    """Bytes by method, then the first method that fits each card."""
    needed, cards = _table("model"), _table("model")
    for kind in EXACT_FIRST:
        needed.add_column(kind, justify="right", no_wrap=True)
    for card in (*(f"{gib} GiB" for gib in CARDS_GIB), "here"):
        cards.add_column(card, justify="right", no_wrap=True)
    for size in sizes:
        needed.add_row(size.size, *(_to_short_bytes(size.needed_bytes[k]) for k in EXACT_FIRST))
        fits = (*size.on_cards.values(), size.here)
        cards.add_row(size.size, *(_SHORT.get(kind, kind) if kind else "-" for kind in fits))
    return Group(
        Text("Memory on a GPU at this recipe's rank, micro-batch and optimizer"), needed,
        Text("The first of full, lora, 8bit (lora-8bit) and qlora that fits"), cards,
        Text(_NOTE_SIZES, style="dim"),
    )  # fmt: skip


def render_rates(found: Any) -> RenderableType:
    """A row a rate, the best one marked, then the advice.

    Args:
        found: an ``api.rates.RateAdvice``.
    """
    table = _table("learning rate")
    for column in ("loss on unseen rows", "against the start"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in found.results:
        loss, is_best = result["loss"], result["rate"] == found.recommended
        cells = ("no number", "-") if loss is None else (
            f"{loss:.4f}", f"{100 * (loss / found.first_loss - 1):+.1f} %"
        )  # fmt: skip
        table.add_row(f"{result['rate']:.2e}", *cells, style="bold green" if is_best else "")
    return Group(table, *(Text(line) for line in found.advice))


def _table(first: str) -> Table:
    """An empty table in the plan's dress."""
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    return table


def _to_cells(method: MethodPlan) -> list[str]:
    """One row of the table."""
    memory = method.memory
    kept = memory.adapter + memory.gradients + memory.optimizer + memory.copies
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
