"""``verify accumulation`` and ``verify packing``: how a step is cut changes nothing it teaches.

    accumulation   1 x 8 = 2 x 4 = 8 x 1           micro-batches x samples in each
    packing        8 x 1 alone = 1 x 8 padded = 2 x 4 packed = 1 x 8 packed = 1 x 8 packed,
                   openings shared

Alone a sample has no neighbour and no padding, so it is what the packed ones are compared
with.  A neighbour that is seen, a position that runs on over a document's end or a loss that
is divided twice would show in the gradients.
"""

from __future__ import annotations

from pathlib import Path

from lorakeet.api.proofs.one_step import Cut, prove_cuts
from lorakeet.base.proofs import Proof

ACCUMULATED = (Cut(size=8), Cut(size=4), Cut(size=1))  # the first is what others are held against
PACKED = (
    Cut(size=1), Cut(size=8), Cut(size=4, packs=True), Cut(size=8, packs=True),
    Cut(size=8, packs=True, shares=True),
)  # fmt: skip
UNPACKED = (
    "This model's documents would see each other in one row, so its samples are always padded; "
    "compared were 8 x 1 and 1 x 8."
)


def verify_accumulation(place: str | Path) -> Proof:
    """Makes one step in three cuts and compares gradients and weights.

    Args:
        place: a recipe file, or the folder of a run, which then gets the proof.

    Raises:
        DataError: there are fewer than 8 samples.
    """
    compared = "gradients and weights of one step on the same 8 samples, cut 1 x 8, 2 x 4 and 8 x 1"
    return prove_cuts(place, ACCUMULATED, name="accumulation", compared=compared)


def verify_packing(place: str | Path) -> Proof:
    """Makes one step alone, padded and packed, and compares; ``place`` and errors likewise."""
    compared = (
        "gradients and weights of one step on the same 8 samples, one by one, padded to the "
        "longest, and packed end to end (with what they open with alike computed once)"
    )
    return prove_cuts(place, PACKED, name="packing", compared=compared, unpacked=UNPACKED)
