"""The headline of a report: a few cards, each with a figure, a tone and the reason for it.

Tones: good, warn, bad, plain, and missing for what was not run.  Colour never
stands alone: each card says its verdict in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorakeet.base.units import to_percent, to_readable_count, to_readable_seconds
from lorakeet.evaluate.run_facts import RunFacts, as_mapping

NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One figure of the headline; ``before`` is the base's value beside it."""

    title: str
    value: str
    note: str = ""
    tone: str = "plain"
    before: str = ""


def build_cards(facts: RunFacts) -> list[Card]:
    """The cards of a run, the ones that were not run last."""
    is_classifier = facts.recipe.get("task") == "classify"
    first = [_classification_card(facts)] if is_classifier else []
    if not is_classifier or "domain" in facts.evaluation:
        first = [_domain_card(facts), _general_card(facts), _perplexity_card(facts), *first]
    cards = [*first, _merge_card(facts), _share_card(facts), _speed_card(facts)]
    return sorted(cards, key=lambda card: card.tone == "missing")


def _domain_card(facts: RunFacts) -> Card:
    both = as_mapping(facts.evaluation.get("domain"))
    base, tuned = as_mapping(both.get("base")), as_mapping(both.get("tuned"))
    if "accuracy" not in tuned:
        return Card(title="Domain answers", value=NOT_RUN, tone="missing",
                    note="set evaluate.questions in the recipe")  # fmt: skip
    note = f"exact answers on {tuned.get('num_questions', '?')} questions"
    if "accuracy" not in base:
        value = to_percent(tuned["accuracy"])
        return Card(title="Domain answers", value=value, note=note)
    points = 100 * (tuned["accuracy"] - base["accuracy"])
    tone = "good" if points > 1 else "warn" if points > -1 else "bad"
    return Card(
        title="Domain answers", value=to_percent(tuned["accuracy"]), tone=tone,
        before=to_percent(base["accuracy"]), note=f"{points:+.1f} points, {note}",
    )  # fmt: skip


def _general_card(facts: RunFacts) -> Card:
    kept = as_mapping(facts.evaluation.get("retention"))
    if "points" not in kept:
        return Card(title="General skills", value=NOT_RUN, tone="missing",
                    note="set evaluate.general in the recipe")  # fmt: skip
    is_lost = kept.get("verdict") == "forgetting"
    tone = "bad" if is_lost else "warn" if kept["points"] < -1 else "good"
    return Card(
        title="General skills", value=to_percent(kept["tuned"]), tone=tone,
        before=to_percent(kept["base"]),
        note=f"{kept['points']:+.1f} points: {kept.get('verdict', '')}",
    )  # fmt: skip


def _perplexity_card(facts: RunFacts) -> Card:
    both = as_mapping(facts.evaluation.get("perplexity"))
    base, tuned = as_mapping(both.get("base")), as_mapping(both.get("tuned"))
    after = tuned.get("perplexity")
    if after is None:
        values = as_mapping(facts.last("evaluation").get("values"))
        if values.get("perplexity") is None:
            return Card(title="Perplexity", value=NOT_RUN, tone="missing",
                        note="set data.validation in the recipe")  # fmt: skip
        return Card(
            title="Perplexity", value=_to_perplexity(values["perplexity"]), note="validation rows"
        )
    before = base.get("perplexity")
    if before is None:
        return Card(title="Perplexity", value=_to_perplexity(after), note="validation rows")
    return Card(
        title="Perplexity", value=_to_perplexity(after), before=_to_perplexity(before),
        tone="good" if after < before else "bad",
        note=f"validation rows; {'lower' if after < before else 'not lower'} than the base's",
    )  # fmt: skip


def _classification_card(facts: RunFacts) -> Card:
    report = as_mapping(facts.evaluation.get("classification"))
    if "accuracy" not in report:
        return Card(title="Classification", value=NOT_RUN, tone="missing",
                    note="run: lorakeet eval FOLDER")  # fmt: skip
    most = max((sum(row) for row in report.get("confusion") or [[0]]), default=0)
    share = most / max(1, report.get("num_rows") or 1)
    return Card(
        title="Accuracy", value=to_percent(report["accuracy"]),
        before=to_percent(share), tone="good" if report["accuracy"] > share else "bad",
        note=f"against always the most frequent label; macro F1 {to_percent(report['macro_f1'])}",
    )  # fmt: skip


def _merge_card(facts: RunFacts) -> Card:
    proof = facts.proofs.get("merge") or {}
    if "passed" not in proof:
        return Card(title="Merge proof", value=NOT_RUN, tone="missing",
                    note="run: lorakeet merge FOLDER --out DIR")  # fmt: skip
    figures = as_mapping(proof.get("figures"))
    found = [
        f"{name.replace('_', ' ')} {_to_figure(value)}"
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    note = "; ".join(found[:2]) or "reloaded from disk and compared"
    passed = bool(proof["passed"])
    return Card(title="Merge proof", value="passed" if passed else "failed", note=note,
                tone="good" if passed else "bad")  # fmt: skip


def _share_card(facts: RunFacts) -> Card:
    method = facts.method
    trained = method.get("trained_parameters")
    total = as_mapping(facts.plan.get("model")).get("parameters")
    if not trained or not total:
        return Card(title="Trained share", value=NOT_RUN, tone="missing", note="no plan.json")
    return Card(
        title="Trained share", value=to_percent(trained / total, digits=2),
        note=f"{to_readable_count(trained)} of {to_readable_count(total)} parameters "
             f"({method.get('kind', '')})",
    )  # fmt: skip


def _speed_card(facts: RunFacts) -> Card:
    done, steps = facts.last("run_finished"), facts.of_kind("step")
    if not steps:
        return Card(title="Training", value=NOT_RUN, tone="missing", note="no step yet")
    duration_s = done.get("duration_s") or sum(step.get("duration_s") or 0 for step in steps)
    rates = sorted(step["tokens_per_s"] for step in steps if step.get("tokens_per_s"))
    rate = done.get("tokens_per_s") or (rates[len(rates) // 2] if rates else None)
    note = f"{len(steps):,} steps" + (f", {rate:,.0f} tokens/s" if rate else "")
    return Card(title="Training", value=to_readable_seconds(duration_s), note=note)


def _to_figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _to_perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"
