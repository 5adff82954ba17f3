"""Base against tuned on the same questions: what was gained and what was forgotten.

    points = 100 * (accuracy of the tuned model - accuracy of the base)

A loss may be chance.  Only questions whose verdict changed speak: with ``lost``
and ``gained`` of them, the sign test asks how often a fair coin would be as
one-sided (McNemar's exact test).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from math import comb
from typing import Any

from lorakeet.base.errors import MismatchError

MAX_LOST_POINTS = 5.0
MAX_EXAMPLES = 20
REMEDY = (
    "Mix 10 to 20 % general rows into data.train (a second source with its weight), lower "
    "train.learning_rate or train.epochs, or lower method.rank; then compare again."
)


def compare_reports(base: Any, tuned: Any) -> dict[str, Any]:
    """Points gained and lost, together and by group, with a verdict in words.

    Args:
        base, tuned: ``AnswerReport`` of the same questions, or its dictionary.

    Returns:
        plain JSON: ``base``, ``tuned`` (accuracies), ``points``, ``num_lost``,
        ``num_gained``, ``p_value``, ``by_group``, ``verdict`` (forgetting, kept or
        gained), ``summary``, ``remedy`` (or None) and ``lost``, up to 20 questions
        that the base knew.

    Raises:
        MismatchError: the reports are not about the same questions.
    """
    first, second = _to_dict(base), _to_dict(tuned)
    before, after = _by_question(first), _by_question(second)
    if before.keys() != after.keys():
        raise MismatchError(
            f"The base answered {len(before)} questions and the tuned model {len(after)}, and "
            f"{len(before.keys() ^ after.keys())} of them differ. Ask both the same file."
        )
    lost = [key for key, row in before.items() if row["is_correct"] > after[key]["is_correct"]]
    num_gained = sum(row["is_correct"] < after[key]["is_correct"] for key, row in before.items())
    points = _points(first, second)
    result = {
        "base": first["accuracy"],
        "tuned": second["accuracy"],
        "points": points,
        "num_questions": first["num_questions"],
        "num_lost": len(lost),
        "num_gained": num_gained,
        "p_value": sign_test(len(lost), num_gained),
        "by_group": _compare_groups(first["by_group"], second["by_group"]),
        "verdict": _to_verdict(points),
        "remedy": REMEDY if points < -MAX_LOST_POINTS else None,
        "lost": [_to_example(before[key], after[key]) for key in lost[:MAX_EXAMPLES]],
    }
    return {**result, "summary": _to_sentence(result)}


def sign_test(num_lost: int, num_gained: int) -> float:
    """How likely a fair coin would be at least as one-sided, 0 to 1.

    >>> sign_test(5, 0), sign_test(3, 3)
    (0.0625, 1.0)
    """
    total, fewer = num_lost + num_gained, min(num_lost, num_gained)
    tail = sum(comb(total, k) for k in range(fewer + 1)) / 2**total
    return min(1.0, 2 * tail)


def _compare_groups(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """The groups, the largest loss first."""
    rows = {
        name: {
            "base": base[name]["accuracy"],
            "tuned": tuned[name]["accuracy"],
            "points": _points(base[name], tuned[name]),
            "num_questions": base[name]["num_questions"],
        }
        for name in base
    }
    return dict(sorted(rows.items(), key=lambda item: item[1]["points"]))


def _to_verdict(points: float) -> str:
    if points < -MAX_LOST_POINTS:
        return "forgetting"
    return "gained" if points > MAX_LOST_POINTS else "kept"


def _to_sentence(result: Mapping[str, Any]) -> str:
    """The comparison in words."""
    opening = {
        "forgetting": "The model has forgotten general skills",
        "kept": "General skills were kept",
        "gained": "General skills have grown",
    }[result["verdict"]]
    chance = f"{100 * result['p_value']:.0f} %" if result["p_value"] >= 0.01 else "under 1 %"
    return (
        f"{opening}: {100 * result['base']:.1f} % before, {100 * result['tuned']:.1f} % after "
        f"({result['points']:+.1f} points on {result['num_questions']} questions). "
        f"Right answers lost: {result['num_lost']}, gained: {result['num_gained']}; a difference "
        f"at least this one-sided would come by chance in {chance} of cases."
    )


def _to_example(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    names = ("question", "expected", "group", "origin")
    return {**{n: before[n] for n in names}, "base": before["got"], "tuned": after["got"]}


def _by_question(report: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    return {(row["origin"], row["question"]): row for row in report["rows"]}


def _points(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> float:
    return round(100 * (tuned["accuracy"] - base["accuracy"]), 2)


def _to_dict(report: Any) -> dict[str, Any]:
    return asdict(report) if is_dataclass(report) else report
