"""Whether the answers of frozen layers are kept on disk, and what that costs and gives.

With F frozen layers below U layers that train, and E passes over the data, a token costs a
layer 2 units forward, and 2 more backward where something trains at or below it:

    without     E (2 F + 4 U)
    with        2 F + 4 E U                speed-up (2 F + 4 U) / (2 F / E + 4 U)

Kept are 4 D bytes a token on a CPU, 2 D on a GPU, of each sample once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lorakeet.base.recipe import Recipe
from lorakeet.base.units import GIB, to_readable_bytes

MAX_CACHE_BYTES = 20 * GIB
MAX_FREE_FRACTION = 0.5  # of the free disk
MIN_SPEED_UP = 1.05  # below it, keeping is not worth the disk


@dataclass(frozen=True, kw_only=True)
class FrozenCachePlan:
    """A decision.

    Args:
        num_layers: frozen layers below the first that trains.
        num_bytes: what all samples take.
        speed_up: of the steps, against computing these layers in every epoch.
        reason: a sentence.
    """

    is_on: bool
    num_layers: int
    num_bytes: int
    speed_up: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class FrozenCase:
    """What the decision depends on besides the recipe.

    Args:
        num_frozen: layers below the first that trains; ``num_layers`` are all.
        num_rows: of the training data; ``num_tokens`` stand in them.
        token_bytes: of a token's state.
        free_bytes: of the disk that the run is written to.
        saved_fraction: of the tokens, where samples share their openings, which cannot be
            done at the same time.
    """

    num_frozen: int
    num_layers: int
    num_rows: int
    num_tokens: int
    token_bytes: int
    free_bytes: int
    saved_fraction: float = 0.0


def plan_frozen_cache(recipe: Recipe, case: FrozenCase) -> FrozenCachePlan:
    """Whether to keep the frozen layers' answers, with the reason."""
    train, frozen = recipe.train, case.num_frozen
    steps = train.epochs * case.num_rows / train.batch_size
    steps = min(steps, train.max_steps) if train.max_steps else steps
    epochs = max(1.0, steps * train.batch_size / max(1, case.num_rows))
    trained = case.num_layers - frozen
    speed_up = (2 * frozen + 4 * trained) / (2 * frozen / epochs + 4 * trained)
    num_bytes = case.num_tokens * case.token_bytes
    room = min(MAX_CACHE_BYTES, int(MAX_FREE_FRACTION * case.free_bytes))
    is_asked = train.cache_frozen_layers == "on"
    shared = 1 / (1 - case.saved_fraction)
    if train.cache_frozen_layers == "off":
        reason = "Off, as the recipe says."
    elif frozen == 0:
        reason = "Off: no layer lies below the first that trains; method.layers can say so."
    elif epochs <= 1:
        reason = "Off: no sample comes a second time."
    elif num_bytes > room:
        reason = (
            f"Off: the answers take {to_readable_bytes(num_bytes)} and there is room for "
            f"{to_readable_bytes(room)}. Free disk, or adapt from a lower layer on."
        )
    elif not is_asked and speed_up < max(MIN_SPEED_UP, shared):
        reason = f"Off: it would make steps {speed_up:.2f}x as fast, sharing {shared:.2f}x."
    else:
        reason = (
            f"On: {frozen} of {case.num_layers} layers are computed once a sample and kept in "
            f"{to_readable_bytes(num_bytes)}; about {speed_up:.2f}x."
        )
    return FrozenCachePlan(
        is_on=reason.startswith("On"), num_layers=frozen, num_bytes=num_bytes,
        speed_up=speed_up, reason=reason,
    )  # fmt: skip
