"""The section ``plan`` of a recipe: what is looked at before a run begins."""

from __future__ import annotations

from lorakeet.base.section import Section, setting


class PlanSettings(Section):
    """What is looked at before a run begins."""

    measure_first: bool = setting(
        True,
        "make real steps on the longest rows first, in a process of their own",
        why="a run that cannot fit is refused at once; costs a second load of the base and two "
        "steps, and is left out where ten times the prediction would fit",
    )
