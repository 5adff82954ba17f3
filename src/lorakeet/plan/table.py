"""The plan as a table for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorakeet.base.units import to_percent, to_readable_bytes, to_readable_count
from lorakeet.plan.choose import Plan


def render_plan(plan: Plan) -> RenderableType:
    """Machine, model, a row a method, reasons and advice."""
    machine, facts = plan.hardware, plan.facts
    head = Text(
        f"{machine.name}, {to_readable_bytes(machine.usable_bytes)} free; {facts.model_type} with "
        f"{to_readable_count(facts.parameters)} parameters in {facts.layers} layers"
    )
    table = Table(header_style="dim")
    table.add_column("method")
    for column in ("trained", "weights", "optimizer", "activations", "total", "tokens/s", "fits"):
        table.add_column(column, justify="right")
    for method in plan.methods:
        memory = method.memory
        kept = memory.adapter + memory.gradients + memory.optimizer
        speed = f"{method.tokens_per_s:,.0f}" if method.tokens_per_s else "-"
        sizes = (memory.weights, kept, memory.activations, memory.total)
        style = "bold green" if method.kind == plan.chosen else ""
        table.add_row(
            method.kind, to_percent(method.trained_fraction), *map(to_readable_bytes, sizes),
            speed, "yes" if method.fits else "no", style=style,
        )  # fmt: skip
    reasons = [Text(f"{method.kind}: {method.why}", style="dim") for method in plan.methods]
    advice = [Text(f"advice: {line}", style="yellow") for line in plan.advice]
    note = Text("Predictions; 'optimizer' holds adapter, gradients and moments.", style="dim")
    return Group(head, table, *reasons, *advice, note, Text(f"chosen: {plan.chosen}", style="bold"))
