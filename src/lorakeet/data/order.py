"""Which rows an optimiser step sees: a pure function of the seed and the step.

Nothing is drawn as training goes, so a resumed run needs only its step number to
see exactly the rows that the uninterrupted run would have seen.

    epoch e, source s:  rows of s in the order of the permutation (seed, e, s)
    a step:             the next ``batch_size`` rows; steps run on over the epoch's end
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorakeet.base.errors import DataError
from lorakeet.base.recipe import Recipe


class StepOrder:
    """The rows of every step of a run.

    Without weights an epoch shows every row once.  With weights w an epoch shows
    every row of the first source once and n_0 w_s / w_0 rows of source s, which
    goes through its own permutations without repetition until one is used up.

    Args:
        source_of: int [N], the source of each row.
        weights: one a source, or None for each.
        batch_size: rows a step.
        epochs: passes over the first source; may be a fraction.
        max_steps: an upper limit, or None.

    Raises:
        DataError: there are no rows, or a weighted source has none.
    """

    def __init__(
        self,
        source_of: np.ndarray,
        weights: Sequence[float | None],
        *,
        batch_size: int,
        seed: int,
        epochs: float,
        max_steps: int | None = None,
    ) -> None:
        self._rows_of = [np.flatnonzero(source_of == s) for s in range(len(weights))]
        self._shares = _count_shares([len(rows) for rows in self._rows_of], weights)
        self.batch_size = batch_size
        self.seed = seed
        self.rows_per_epoch = sum(self._shares)
        if not self.rows_per_epoch:
            raise DataError("there are no rows to train on.")
        wanted = max(1, round(epochs * self.rows_per_epoch / batch_size))
        self.num_steps = min(wanted, max_steps) if max_steps else wanted
        self._epochs: dict[int, np.ndarray] = {}

    @classmethod
    def of_recipe(cls, recipe: Recipe, source_of: np.ndarray) -> StepOrder:
        """The order of a recipe's run over rows of these sources."""
        settings = recipe.train
        return cls(
            source_of, [source.weight for source in recipe.data.train],
            batch_size=settings.batch_size, seed=settings.seed,
            epochs=settings.epochs, max_steps=settings.max_steps,
        )  # fmt: skip

    def epoch_at(self, step: int) -> float:
        """Passes over the data after a step, a fraction."""
        return step * self.batch_size / self.rows_per_epoch

    def rows_of_step(self, step: int) -> list[int]:
        """The rows of a step.

        Args:
            step: counted from 1.

        Returns:
            ``batch_size`` indices into the shards.
        """
        first = (step - 1) * self.batch_size
        rows = []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, self.rows_per_epoch)
            rows.append(int(self._epoch_rows(epoch)[place]))
        return rows

    def _epoch_rows(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in their order; the last two epochs are kept."""
        if epoch not in self._epochs:
            parts = [
                _draw(rows, epoch * share, share, (self.seed, source))
                for source, (rows, share) in enumerate(
                    zip(self._rows_of, self._shares, strict=True)
                )
            ]
            whole = np.concatenate(parts)
            _generator(self.seed, epoch, len(parts)).shuffle(whole)
            self._epochs = {e: r for e, r in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = whole
        return self._epochs[epoch]


def split_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The rows of a step in groups of similar length whose padded area fits.

    Args:
        lengths: tokens of each row of the step.
        max_tokens: rows x longest row stays at or below it; a single longer row
            stands alone.

    Returns:
        positions within the step, each exactly once, the longest group first.

    >>> split_micro_batches([10, 90, 12, 88], max_tokens=200)
    [[1, 3], [2, 0]]
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _count_shares(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Rows of each source in one epoch."""
    if any(weight is None for weight in weights):
        return list(sizes)
    empty = [number for number, size in enumerate(sizes) if not size]
    if empty:
        raise DataError(
            f"data.train entry {empty[0] + 1} has a weight and no usable row. Remove the entry, "
            "or look into dropped.jsonl."
        )
    return [round(sizes[0] * weight / weights[0]) for weight in weights]


def _draw(rows: np.ndarray, start: int, count: int, key: tuple[int, int]) -> np.ndarray:
    """``count`` rows from an endless row of permutations, from ``start`` on."""
    seed, source = key
    drawn = []
    while count:
        cycle, place = divmod(start, len(rows))
        order = _generator(seed, cycle, source, 1).permutation(rows)[place : place + count]
        drawn.append(order)
        start += len(order)
        count -= len(order)
    return np.concatenate(drawn) if drawn else rows[:0]


def _generator(*key: int) -> np.random.Generator:
    """A generator that depends on its key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
