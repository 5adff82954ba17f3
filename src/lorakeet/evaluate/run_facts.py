"""Everything that a run folder tells, read once; what is missing or damaged is left out.

A report must open for a run that was killed in the middle, so no file is
required.  A file that is there and cannot be read is named in ``problems``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.base.errors import DataError, RecipeError
from lorakeet.base.events import read_events
from lorakeet.base.recipe_file import read_yaml, to_yaml
from lorakeet.base.run_folder import RunFolder, read_json

MAX_DROPPED_SHOWN = 30


@dataclass(kw_only=True)
class RunFacts:
    """The content of a run folder.

    Args:
        evaluation, data, plan, resolved: empty when their file is missing or damaged.
        proofs: content of ``proofs/*.json`` by file name without ending.
        dropped: the first rows of ``dropped.jsonl``.
        problems: a sentence for each file that could not be read.
    """

    name: str
    events: list[dict[str, Any]]
    evaluation: dict[str, Any]
    data: dict[str, Any]
    plan: dict[str, Any]
    resolved: dict[str, Any]
    proofs: dict[str, dict[str, Any]]
    dropped: list[dict[str, Any]]
    recipe_text: str = ""
    problems: list[str] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind, in order."""
        return [event for event in self.events if event["kind"] == kind]

    def last(self, kind: str) -> dict[str, Any]:
        """The newest event of a kind, or an empty one."""
        return next((event for event in reversed(self.events) if event["kind"] == kind), {})

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe with every decided value; empty when it is not known."""
        return as_mapping(self.resolved.get("recipe")) or as_mapping(
            self.last("run_started").get("recipe")
        )

    @property
    def method(self) -> dict[str, Any]:
        """The plan's entry of the method that was trained."""
        kind = as_mapping(self.recipe.get("method")).get("kind") or self.plan.get("chosen")
        methods = [as_mapping(method) for method in self.plan.get("methods") or []]
        return next((method for method in methods if method.get("kind") == kind), {})


def read_run(run: RunFolder) -> RunFacts:
    """All that is there."""
    problems: list[str] = []
    resolved = _read_yaml(run.resolved, problems)
    facts = RunFacts(
        name=run.path.resolve().name,
        events=read_events(run.events),
        evaluation=_read_json(run.evaluation, problems),
        data=_read_json(run.data_report, problems),
        plan=_read_json(run.plan, problems),
        resolved=resolved,
        proofs={p.stem: _read_json(p, problems) for p in sorted(run.proofs.glob("*.json"))},
        dropped=_read_dropped(run.dropped),
        problems=problems,
    )
    facts.recipe_text = to_yaml(facts.recipe) if facts.recipe else ""
    return facts


def as_mapping(value: Any) -> dict[str, Any]:
    """A mapping as it is, and anything else as an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return as_mapping(read_json(path))
    except DataError as error:
        problems.append(str(error))
        return {}


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return as_mapping(read_yaml(path))
    except RecipeError as error:
        problems.append(str(error))
        return {}


def _read_dropped(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if len(rows) == MAX_DROPPED_SHOWN:
                break
            try:
                rows.append(as_mapping(json.loads(line)))
            except json.JSONDecodeError:
                continue
    return rows
