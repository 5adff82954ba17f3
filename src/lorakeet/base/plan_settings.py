"""The section ``plan`` of a recipe: what is looked at before a run begins."""

from __future__ import annotations

from lorakeet.base.section import Section, setting


class PlanSettings(Section):
    """What is looked at before a run begins."""

    measure_first: bool = setting(
        True,
        "make two real steps in a process of their own where the memory could be short",
        why="costs a moment, and only where the prediction takes more than half of what is free",
    )
