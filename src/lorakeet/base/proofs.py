"""A proof: what was compared, the figure that was found, and what it may be at most.

Proofs lie in the run's ``proofs/<name>.json``, one file a proof, the newest wins.
The report shows every file that it finds there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorakeet.base.run_folder import RunFolder, write_json


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The outcome of one comparison.

    Args:
        compared: what stands on either side, a finished sentence.
        figures: measured values by name, the judged one first.
        tolerances: what a judged figure may be at most, by the name of the figure.
        problems: a sentence for each figure outside its tolerance.
        notes: what could not be checked, and why.
        time: when it was made, ISO 8601 in UTC.
        versions: of the packages that can change a number.
    """

    name: str
    compared: str
    figures: Mapping[str, Any]
    tolerances: Mapping[str, float]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    time: str = field(default_factory=_now)

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values with the verdict beside them."""
        return {**asdict(self), "passed": self.passed}


def write_proof(run: RunFolder, proof: Proof) -> Path:
    """Puts ``proofs/<name>.json`` in place; an older proof of that name is replaced."""
    path = run.proofs / f"{proof.name}.json"
    write_json(path, proof.to_dict())
    return path


def find_excess(figures: Mapping[str, Any], tolerances: Mapping[str, float]) -> tuple[str, ...]:
    """A sentence for each figure above its tolerance; NaN is above every tolerance.

    >>> find_excess({"difference": 2.0}, {"difference": 1.0})
    ('difference is 2; at most 1 is allowed.',)
    """
    return tuple(
        f"{name.replace('_', ' ')} is {figures[name]:.3g}; at most {limit:.3g} is allowed."
        for name, limit in tolerances.items()
        if not figures[name] <= limit
    )
