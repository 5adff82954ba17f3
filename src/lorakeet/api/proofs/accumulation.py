"""``verify accumulation``: one step gives the same gradients however it is cut.

1 x 8 = 2 x 4 = 8 x 1        micro-batches x samples in each
"""

from __future__ import annotations

from pathlib import Path

from lorakeet.api.proofs.one_step import Cut, prove_cuts
from lorakeet.base.proofs import Proof

CUTS = (Cut(size=8), Cut(size=4), Cut(size=1))  # the first is what the others are compared with


def verify_accumulation(place: str | Path) -> Proof:
    """Makes one step in three cuts and compares gradients and weights.

    Args:
        place: a recipe file, or the folder of a run, which then gets the proof.

    Raises:
        DataError: there are fewer than 8 samples.
    """
    return prove_cuts(
        place,
        CUTS,
        name="accumulation",
        compared="gradients and weights of one step on the same 8 samples, cut 1 x 8, 2 x 4 and "
        "8 x 1",
    )
