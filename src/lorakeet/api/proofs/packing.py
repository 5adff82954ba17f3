"""``verify packing``: samples end to end teach what each of them teaches alone.

    8 x 1 alone = 1 x 8 padded = 2 x 4 packed = 1 x 8 packed = 1 x 8 packed, openings shared

Alone a sample has no neighbour and no padding, so it is what the others are compared
with.  A neighbour that is seen, a position that runs on over a document's end or a
loss that is divided twice would show in the gradients.
"""

from __future__ import annotations

from pathlib import Path

from lorakeet.api.proofs.one_step import Cut, prove_cuts
from lorakeet.base.proofs import Proof

CUTS = (
    Cut(size=1), Cut(size=8), Cut(size=4, packs=True), Cut(size=8, packs=True),
    Cut(size=8, packs=True, shares=True),
)  # fmt: skip
UNPACKED = (
    "This model's documents would see each other in one row, so its samples are always padded; "
    "compared were 8 x 1 and 1 x 8."
)


def verify_packing(place: str | Path) -> Proof:
    """Makes one step alone, padded and packed, and compares gradients and weights.

    Args:
        place: a recipe file, or the folder of a run, which then gets the proof.

    Raises:
        DataError: there are fewer than 8 samples.
    """
    return prove_cuts(
        place,
        CUTS,
        name="packing",
        compared="gradients and weights of one step on the same 8 samples, one by one, padded to "
        "the longest, and packed end to end (with what they open with alike computed once)",
        unpacked=UNPACKED,
    )
