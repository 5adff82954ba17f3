"""The data report: what was found in the rows, in numbers and in plain words.

``DataLinter`` watches the rows pass and keeps counts only, so it costs the same
memory for a thousand rows and for a hundred million (apart from one hash per
labelled text, which finds texts with two labels).  Its report is a plain
dictionary for ``report.json``; each warning says what was found and what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorakeet.base.records import Conversation, DroppedRow, EncodedSample, LabelledText, Sample
from lorakeet.base.units import to_percent
from lorakeet.data.clean import texts_of
from lorakeet.data.dedup import content_hash
from lorakeet.data.lint_warnings import list_warnings
from lorakeet.data.scripts import main_script

_BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_PARTIAL_CODES = frozenset({"cut"})  # reported, and yet trained on


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFacts:
    """What the report needs to know of a sample.

    Args:
        is_unanswered: a conversation that does not end with an assistant turn.
        text_hash: of a labelled text without its label; else None.
    """

    path: str
    schema: str
    script: str
    is_unanswered: bool = False
    label: str = ""
    text_hash: bytes | None = None


def read_facts(sample: Sample, schema: str) -> SampleFacts:
    """The facts of a sample that was read by a schema."""
    text_hash = None
    if isinstance(sample, LabelledText):
        text_hash = content_hash(replace(sample, label=""))
    return SampleFacts(
        path=sample.origin.path, schema=schema, text_hash=text_hash,
        script=main_script(" ".join(texts_of(sample))),
        is_unanswered=isinstance(sample, Conversation) and sample.turns[-1].role != "assistant",
        label=sample.label if isinstance(sample, LabelledText) else "",
    )  # fmt: skip


class DataLinter:
    """Counts what passes and turns it into a report.

    Call ``add_sample`` for every sample that is kept, ``add_dropped`` for every
    ``DroppedRow``, ``add_masked`` with the counts of ``mask_private`` and
    ``add_encoded`` for every encoded sample; the order does not matter.
    """

    def __init__(self) -> None:
        self._schemas: Counter[str] = Counter()
        self._sources: dict[str, Counter[str]] = {}
        self._dropped: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._scripts: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()
        self._masked: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()
        self._num_trained_tokens = 0
        self._num_user_endings = 0
        self._label_of_text: dict[bytes, str] = {}
        self._num_conflicts = 0

    def add_sample(self, sample: Sample, schema: str) -> None:
        """Counts a sample that was kept, under the name of the schema it was read by."""
        self.add_facts(read_facts(sample, schema))

    def add_facts(self, facts: SampleFacts) -> None:
        """Counts a sample of which only the facts are at hand."""
        self._schemas[facts.schema] += 1
        self._source(facts.path)["samples"] += 1
        self._scripts[facts.script] += 1
        self._num_user_endings += facts.is_unanswered
        if facts.text_hash is not None:
            self._labels[facts.label] += 1
            first = self._label_of_text.setdefault(facts.text_hash, facts.label)
            self._num_conflicts += first != facts.label

    def add_dropped(self, row: DroppedRow) -> None:
        """Counts a row that is not used, or only in part; the first of each code is quoted."""
        self._dropped[row.code] += 1
        self._examples.setdefault(row.code, f"{row.origin}: {row.reason}")
        if row.code not in _PARTIAL_CODES:
            self._source(row.origin.path)["dropped"] += 1

    def add_masked(self, counts: Mapping[str, int]) -> None:
        """Adds what ``mask_private`` replaced, by kind."""
        self._masked.update(counts)

    def add_encoded(self, encoded: EncodedSample) -> None:
        """Counts the tokens of an encoded sample."""
        self._lengths[len(encoded.ids)] += 1
        self._num_trained_tokens += int(encoded.mask.sum())

    def to_report(self) -> dict[str, Any]:
        """Everything counted so far as JSON values; ``warnings`` is a list of sentences."""
        num_samples = self._schemas.total()
        num_lost = sum(n for code, n in self._dropped.items() if code not in _PARTIAL_CODES)
        report: dict[str, Any] = {
            "num_rows": num_samples + num_lost,
            "num_samples": num_samples,
            "num_dropped": num_lost,
            "num_cut": self._dropped.total() - num_lost,
            "dropped_fraction": _share(num_lost, num_samples + num_lost),
            "schemas": dict(self._schemas.most_common()),
            "sources": {path: dict(counts) for path, counts in sorted(self._sources.items())},
            "dropped": {
                code: {"rows": number, "example": self._examples[code]}
                for code, number in self._dropped.most_common()
            },
            "tokens": self._to_tokens(),
            "languages": {
                name: _share(number, num_samples) for name, number in self._scripts.most_common()
            },
            "labels": dict(self._labels.most_common()),
            "num_label_conflicts": self._num_conflicts,
            "num_without_last_answer": self._num_user_endings,
            "private_data_masked": dict(self._masked.most_common()),
        }
        report["warnings"] = list_warnings(report)
        return report

    def _source(self, path: str) -> Counter[str]:
        return self._sources.setdefault(path, Counter(samples=0, dropped=0))

    def _to_tokens(self) -> dict[str, Any]:
        total = sum(length * number for length, number in self._lengths.items())
        return {
            "total": total,
            "trained": self._num_trained_tokens,
            "trained_fraction": _share(self._num_trained_tokens, total),
            "min": min(self._lengths, default=0),
            "median": self._quantile(0.5),
            "p95": self._quantile(0.95),
            "max": max(self._lengths, default=0),
            "histogram": self._to_histogram(),
        }

    def _quantile(self, fraction: float) -> int:
        """The smallest length that at least this fraction of the samples does not exceed."""
        needed, seen = fraction * self._lengths.total(), 0
        for length in sorted(self._lengths):
            seen += self._lengths[length]
            if seen >= needed:
                return length
        return 0

    def _to_histogram(self) -> list[dict[str, int]]:
        """Rows by length; the last bin takes everything longer.  Empty ends are left out."""
        longest = max(self._lengths, default=0)
        edges = [edge for edge in _BINS if edge < longest] + [max(longest, 1)]
        bins, low = [], 1
        for edge in edges:
            rows = sum(n for length, n in self._lengths.items() if low <= length <= edge)
            bins.append({"from_tokens": low, "to_tokens": edge, "rows": rows})
            low = edge + 1
        return bins


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def summarise(report: Mapping[str, Any]) -> str:
    """The report in one line, for a progress bar or a log.

    >>> summarise({"num_samples": 90, "num_dropped": 10, "dropped_fraction": 0.1,
    ...            "tokens": {"total": 1000, "trained": 250}, "warnings": []})
    '90 samples, 10 rows dropped (10.0 %), 1,000 tokens of which 250 are trained, 0 warnings'
    """
    tokens = report["tokens"]
    return (
        f"{report['num_samples']:,} samples, {report['num_dropped']:,} rows dropped "
        f"({to_percent(report['dropped_fraction'])}), {tokens['total']:,} tokens of which "
        f"{tokens['trained']:,} are trained, {len(report['warnings'])} warnings"
    )
