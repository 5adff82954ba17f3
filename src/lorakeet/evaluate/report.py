"""One self-contained page about a run: what was asked, what happened, what was proven.

The page is made from the run folder alone, holds its own style and drawings and
asks nothing of any network.  What was not run says so; nothing that is missing
or damaged stops the page.  All text is escaped: a model's answer stays text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from lorakeet.base.run_folder import RunFolder, write_text
from lorakeet.base.units import to_percent, to_readable_bytes, to_readable_count
from lorakeet.evaluate.cards import build_cards
from lorakeet.evaluate.charts import Series, draw_lines, smooth
from lorakeet.evaluate.run_facts import RunFacts, as_mapping, read_run

TEMPLATES = Path(__file__).resolve().parent / "templates"
MAX_ANSWERS = 40
MAX_ERRORS = 50
MAX_MATRIX_LABELS = 30
SMOOTH_FROM_STEPS = 40


def write_report(run: RunFolder) -> Path:
    """Writes ``report.html`` and returns its path.

    Args:
        run: finished, still running or broken off; any file may be missing.
    """
    write_text(run.report, render_report(read_run(run)))
    return run.report


def render_report(facts: RunFacts) -> str:
    """The page as a string."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=_to_percent, size=_to_size, count=_to_count, points=lambda p: f"{p:+.1f}"
    )
    return environment.get_template("report.html.jinja").render(
        facts=facts,
        status=describe_status(facts),
        cards=build_cards(facts),
        charts=draw_charts(facts),
        alarms=group_alarms(facts),
        comparisons=compare_sides(facts),
        retention=as_mapping(facts.evaluation.get("retention")),
        served=facts.evaluation.get("served") or [],
        samples=collect_samples(facts),
        matrix=shade_matrix(facts),
        plan=compare_plan(facts),
        max_errors=MAX_ERRORS,
    )


def describe_status(facts: RunFacts) -> dict[str, str]:
    """A word and a sentence about how the run ended, or that it has not."""
    newest = next(
        (
            event
            for event in reversed(facts.events)
            if event["kind"] in ("run_finished", "run_interrupted", "run_started", "step")
        ),
        None,
    )
    if newest is None:
        return {"word": "not started", "tone": "missing", "text": "No step was recorded."}
    if newest["kind"] == "run_interrupted":
        text = f"Stopped after step {newest.get('step')}; 'lorakeet resume' goes on from there."
        return {"word": "interrupted", "tone": "warn", "text": text}
    if newest["kind"] != "run_finished":
        text = "The run goes on, or was killed; 'lorakeet resume' continues it."
        return {"word": "unfinished", "tone": "warn", "text": text}
    text = f"{newest.get('steps', '?')} steps"
    if newest.get("best_step"):
        text += f", best at step {newest['best_step']}"
    if newest.get("stopped_because"):
        text += f". {newest['stopped_because'].rstrip('.')}"
    return {"word": "finished", "tone": "good", "text": text + "."}


def group_alarms(facts: RunFacts) -> list[dict[str, str]]:
    """One line for each kind of alarm: when it sounded first, how often, and what it said."""
    codes: dict[str, list[dict[str, Any]]] = {}
    for alarm in facts.of_kind("alarm"):
        codes.setdefault(str(alarm.get("code")), []).append(alarm)
    lines = []
    for code, found in codes.items():
        first, last = found[0].get("step"), found[-1].get("step")
        when = (
            f"{len(found)} times from step {first} to {last}" if len(found) > 1 else f"step {first}"
        )
        lines.append({"code": code, "when": when, "message": str(found[0].get("message", ""))})
    return lines


def draw_charts(facts: RunFacts) -> list[Any]:
    """Loss, the validation metrics, learning rate, speed and gradient norm over the steps."""
    steps = _newest_by_step(facts.of_kind("step"))
    looks = _newest_by_step(facts.of_kind("evaluation"))
    losses = _points(steps, "loss")
    best = facts.last("run_finished").get("best_step")
    train = [Series(name="training", points=losses, style="s1")]
    if len(losses) > SMOOTH_FROM_STEPS:
        faint = Series(name="", points=losses, style="faint")
        train = [faint, Series(name="training", points=smooth(losses), style="s1")]
    values = [{"step": look["step"], **as_mapping(look.get("values"))} for look in looks]
    seen = Series(name="validation", points=_points(values, "loss"), style="s2", has_dots=True)
    mark = (best, "best") if best else None
    drawn = [draw_lines([*train, seen], x_label="step", y_label="loss (nats)", mark=mark)]
    for name in ("perplexity", "accuracy", "f1"):
        line = Series(name=name, points=_points(values, name), style="s2", has_dots=True)
        drawn.append(draw_lines([line], x_label="step", y_label=f"validation {name}", mark=mark))
    for name, label in (("learning_rate", "learning rate"), ("tokens_per_s", "tokens per second"),
                        ("gradient_norm", "gradient norm")):  # fmt: skip
        line = Series(name=label, points=_points(steps, name))
        drawn.append(draw_lines([line], x_label="step", y_label=label))
    return [chart for chart in drawn if chart]


def compare_sides(facts: RunFacts) -> list[dict[str, Any]]:
    """Domain and general questions: a table by group, and answers of base and tuned in pairs."""
    result = []
    for name in ("domain", "general"):
        both = as_mapping(facts.evaluation.get(name))
        base, tuned = as_mapping(both.get("base")), as_mapping(both.get("tuned"))
        if not tuned.get("rows"):
            continue
        before = {(r.get("origin"), r.get("question")): r for r in base.get("rows") or []}
        pairs = [
            {**row, "base": before.get((row.get("origin"), row.get("question")))}
            for row in tuned["rows"]
        ]
        result.append(
            {
                "name": name,
                "base": base,
                "tuned": tuned,
                "groups": _pair_groups(base, tuned),
                "pairs": _choose_pairs(pairs),
                "num_pairs": len(pairs),
            }
        )
    return result


def collect_samples(facts: RunFacts) -> list[dict[str, Any]]:
    """Each sample prompt with its answers in the order of the steps."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for event in _newest_by_step(facts.of_kind("sample_answers")):
        for pair in event.get("answers") or []:
            if len(pair) == 2:
                answers = by_prompt.setdefault(str(pair[0]), [])
                if not answers or answers[-1]["answer"] != pair[1]:
                    answers.append({"step": event["step"], "answer": pair[1]})
    return [{"prompt": prompt, "answers": answers} for prompt, answers in by_prompt.items()]


def shade_matrix(facts: RunFacts) -> dict[str, Any]:
    """The confusion matrix with each cell's share of its row; empty when there is none."""
    report = as_mapping(facts.evaluation.get("classification"))
    matrix, names = report.get("confusion"), report.get("label_names")
    if not matrix or not names:
        return {}
    rows = [
        {
            "name": name,
            "cells": [
                {"count": n, "share": n / max(1, sum(row)), "is_right": i == j}
                for j, n in enumerate(row)
            ],
        }
        for i, (name, row) in enumerate(zip(names, matrix, strict=False))
    ]
    return {
        "names": names,
        "rows": rows if len(names) <= MAX_MATRIX_LABELS else [],
        "per_label": as_mapping(report.get("per_label")),
        "errors": report.get("errors") or [],
        "num_errors": report.get("num_errors", len(report.get("errors") or [])),
    }


def compare_plan(facts: RunFacts) -> list[dict[str, str]]:
    """What was predicted beside what was measured, where both or one is known."""
    predicted = as_mapping(facts.method.get("bytes"))
    measured = as_mapping(facts.plan.get("measured"))
    done = facts.last("run_finished")
    rows = [
        {"name": f"memory: {part}", "predicted": _to_size(value), "measured": ""}
        for part, value in predicted.items()
        if part != "total"
    ]
    peak = measured.get("peak_bytes") or done.get("peak_bytes")
    if predicted.get("total") or peak:
        rows.append({"name": "memory: total", "predicted": _to_size(predicted.get("total")),
                     "measured": _to_size(peak)})  # fmt: skip
    speed = facts.method.get("tokens_per_s") or facts.plan.get("tokens_per_s")
    found = done.get("tokens_per_s") or measured.get("tokens_per_s")
    if speed or found:
        rows.append({"name": "tokens per second", "predicted": _to_count(speed),
                     "measured": _to_count(found)})  # fmt: skip
    return rows


def _choose_pairs(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to 40 answers: those the tuning lost, those still wrong, those it gained, the rest."""

    def rank(pair: dict[str, Any]) -> int:
        was_right = bool(as_mapping(pair["base"]).get("is_correct"))
        is_right = bool(pair.get("is_correct"))
        return {(True, False): 0, (False, False): 1, (False, True): 2}.get((was_right, is_right), 3)

    kinds: list[list[dict[str, Any]]] = [[], [], [], []]
    for pair in pairs:
        kinds[rank(pair)].append(pair)
    share = MAX_ANSWERS // 4
    chosen = [pair for kind in kinds for pair in kind[:share]]
    rest = [pair for kind in kinds for pair in kind[share:]]
    return sorted(chosen + rest[: MAX_ANSWERS - len(chosen)], key=rank)


def _pair_groups(base: dict[str, Any], tuned: dict[str, Any]) -> list[dict[str, Any]]:
    before = as_mapping(base.get("by_group"))
    return [
        {
            "name": name,
            "num_questions": as_mapping(group).get("num_questions"),
            "base": as_mapping(before.get(name)).get("accuracy"),
            "tuned": as_mapping(group).get("accuracy"),
        }
        for name, group in as_mapping(tuned.get("by_group")).items()
    ]


def _newest_by_step(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One event a step, ascending: a resumed run repeats steps after its checkpoint."""
    newest = {event["step"]: event for event in events if isinstance(event.get("step"), int)}
    return [newest[step] for step in sorted(newest)]


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def _to_percent(value: Any) -> str:
    return to_percent(value) if isinstance(value, (int, float)) else "–"


def _to_size(value: Any) -> str:
    return to_readable_bytes(value) if isinstance(value, (int, float)) else ""


def _to_count(value: Any) -> str:
    return to_readable_count(value) if isinstance(value, (int, float)) else ""
