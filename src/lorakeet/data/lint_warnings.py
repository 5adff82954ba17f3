"""Plain-word warnings about a data set, drawn from the numbers of its report.

Each rule is one function: it reads the report and returns a sentence, or None.
A sentence says what was found, why it matters and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorakeet.base.units import to_percent

FEW_SAMPLES = 50  # below this a fine-tuned model mostly memorises
MAX_DROPPED_FRACTION = 0.2
MAX_DUPLICATE_FRACTION = 0.1
MIN_TRAINED_FRACTION = 0.05
MAX_LABEL_RATIO = 10
FEW_ROWS_PER_LABEL = 8
LONG_RATIO = 8  # p95 to maximum; one such row decides the memory of the run

Report = Mapping[str, Any]
_LARGEST_MIX = 0.95


def list_warnings(report: Report) -> list[str]:
    """Every warning that applies to a report, the gravest first."""
    found = (rule(report) for rule in _RULES)
    return [sentence for sentence in found if sentence is not None]


def _no_samples(report: Report) -> str | None:
    if report["num_samples"]:
        return None
    return "No row became a sample. The reasons are listed under 'dropped'; mend those rows first."


def _few_samples(report: Report) -> str | None:
    number = report["num_samples"]
    if not 0 < number < FEW_SAMPLES:
        return None
    return (
        f"There are only {number} samples; the model will mostly learn them by heart. "
        f"A few hundred good ones are a better start, {FEW_SAMPLES} the least."
    )


def _many_dropped(report: Report) -> str | None:
    share = report["dropped_fraction"]
    if share <= MAX_DROPPED_FRACTION or not report["num_samples"]:
        return None
    code, first = next(iter(report["dropped"].items()))
    return (
        f"{report['num_dropped']:,} of {report['num_rows']:,} rows ({to_percent(share)}) were "
        f"dropped, most often for '{code}', such as {first['example']} "
        "All of them are in dropped.jsonl with file and line."
    )


def _duplicates(report: Report) -> str | None:
    number = report["dropped"].get("duplicate", {"rows": 0})["rows"]
    share = number / report["num_rows"] if report["num_rows"] else 0
    if share <= MAX_DUPLICATE_FRACTION:
        return None
    return (
        f"{number:,} rows ({to_percent(share)}) repeat an earlier one and were dropped. "
        "Check that no file was given twice."
    )


def _cut(report: Report) -> str | None:
    if not report["num_cut"]:
        return None
    return (
        f"Samples longer than data.max_tokens that were cut: {report['num_cut']:,}. The model "
        "sees answers that stop in the middle; raise data.max_tokens or shorten the samples."
    )


def _very_long(report: Report) -> str | None:
    tokens = report["tokens"]
    if tokens["max"] < 512 or tokens["max"] <= LONG_RATIO * max(tokens["p95"], 1):
        return None
    return (
        f"The longest sample has {tokens['max']:,} tokens, while 95 % have at most "
        f"{tokens['p95']:,}. It decides how much memory the run needs; split or remove it."
    )


def _little_trained(report: Report) -> str | None:
    tokens = report["tokens"]
    if not tokens["total"] or tokens["trained"] == 0:
        return None  # classification trains no token
    if tokens["trained_fraction"] >= MIN_TRAINED_FRACTION:
        return None
    return (
        f"Only {to_percent(tokens['trained_fraction'])} of the tokens are trained; the rest are "
        "prompts. Shorter prompts would make the same run cheaper."
    )


def _languages(report: Report) -> str | None:
    mix = {name: share for name, share in report["languages"].items() if share >= 0.01}
    if len(mix) < 2 or max(mix.values()) > _LARGEST_MIX:
        return None
    listed = ", ".join(f"{name} {to_percent(share)}" for name, share in mix.items())
    return (
        f"The samples mix scripts: {listed}. If that is intended, see that the validation "
        "questions do too; otherwise look for a file that does not belong."
    )


def _last_answer(report: Report) -> str | None:
    number = report["num_without_last_answer"]
    if not number:
        return None
    return (
        f"Conversations that do not end with an assistant turn: {number:,}. What follows the last "
        "answer is kept, but nothing of it is trained. Remove those turns or add the answers."
    )


def _label_imbalance(report: Report) -> str | None:
    labels = report["labels"]
    if len(labels) < 2:
        return None
    (most, num_most), (least, num_least) = max_min(labels)
    if num_most <= MAX_LABEL_RATIO * num_least:
        return None
    return (
        f"Label '{most}' has {num_most:,} rows and '{least}' only {num_least:,}. The model may "
        "hardly ever choose the rare one: add rows, and watch macro F1 rather than accuracy."
    )


def _rare_labels(report: Report) -> str | None:
    rare = [name for name, rows in report["labels"].items() if rows < FEW_ROWS_PER_LABEL]
    if not rare:
        return None
    shown = ", ".join(repr(name) for name in rare[:5]) + (" ..." if len(rare) > 5 else "")
    return (
        f"Labels with fewer than {FEW_ROWS_PER_LABEL} rows: {shown} ({len(rare)} in all). "
        "Check them for spelling, merge them or add rows."
    )


def _one_label(report: Report) -> str | None:
    if len(report["labels"]) != 1:
        return None
    return (
        f"All rows have the label '{next(iter(report['labels']))}', so there is nothing to tell "
        "apart. Add rows of the other classes or check data.label_column."
    )


def _label_conflicts(report: Report) -> str | None:
    number = report["num_label_conflicts"]
    if not number:
        return None
    return (
        f"Rows that repeat a text under another label, which cannot be learned: {number:,}. "
        "Decide on one label for each text."
    )


def _private_data(report: Report) -> str | None:
    masked = report["private_data_masked"]
    if not masked:
        return None
    listed = ", ".join(f"{number:,} {kind}" for kind, number in masked.items())
    return (
        f"Private data was masked: {listed}. Read a few masked rows with 'lorakeet data show'; "
        "names and addresses are not searched for."
    )


def max_min(counts: Mapping[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
    """The most and the least frequent entries with their counts.

    >>> max_min({"a": 3, "b": 1})
    (('a', 3), ('b', 1))
    """
    most = max(counts, key=lambda name: counts[name])
    least = min(counts, key=lambda name: counts[name])
    return (most, counts[most]), (least, counts[least])


_RULES: tuple[Callable[[Report], str | None], ...] = (
    _no_samples,
    _one_label,
    _many_dropped,
    _few_samples,
    _duplicates,
    _cut,
    _label_conflicts,
    _label_imbalance,
    _rare_labels,
    _last_answer,
    _very_long,
    _little_trained,
    _languages,
    _private_data,
)
