"""The choice of one token from logits: greedy, or drawn from a cut and scaled distribution.

    p = softmax(logits / temperature), cut to top_k tokens, then to the smallest
    set with probability top_p, renormalised; the token is where the cumulated
    probability passes a uniform number u.

Each row has its own generator, so an answer depends on its prompt and settings
only, never on its neighbours in the batch.

Shape letters:  B rows,  V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakeet.base.errors import NumericsError
from lorakeet.infer.sampling import SamplingSettings


def draw_tokens(
    logits_BV: Tensor,
    settings: Sequence[SamplingSettings],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """One token id for each row.

    Args:
        logits_BV: float, read only.
        settings: one for each row.
        generators: one on the CPU for each row; a row that is not greedy advances
            its generator by one number.

    Raises:
        NumericsError: a row holds NaN, so no token is likelier than another.
    """
    logits_BV = logits_BV.float()
    if bool(torch.isnan(logits_BV).any()):
        raise NumericsError(
            "The model's logits hold NaN, so no token can be chosen. Its weights are damaged or "
            "its numbers overflow; check the adapter, or load the model with dtype float32."
        )
    tokens = logits_BV.argmax(dim=-1).tolist()
    for row, (rules, generator) in enumerate(zip(settings, generators, strict=True)):
        if not rules.is_greedy:
            tokens[row] = draw_token(logits_BV[row], rules, generator)
    return tokens


def draw_token(logits_V: Tensor, settings: SamplingSettings, generator: torch.Generator) -> int:
    """One token drawn from the distribution that the settings leave.

    Guarantees:
        the token is among the top_k likeliest and in the top_p set; the likeliest
        token is always in both.

    Cost: one sort of V numbers.
    """
    sorted_V, ids_V = torch.sort(logits_V, descending=True)
    if settings.top_k:
        sorted_V = sorted_V[: settings.top_k]
    probability = torch.softmax((sorted_V - sorted_V[0]) / settings.temperature, dim=-1)
    before = probability.cumsum(-1) - probability
    probability = torch.where(before < settings.top_p, probability, 0.0)
    cumulated = probability.double().cumsum(-1)
    u = torch.rand(1, generator=generator, dtype=torch.float64).to(cumulated.device)
    place = torch.searchsorted(cumulated, u * cumulated[-1], right=True)
    last = int((probability > 0).sum()) - 1
    return int(ids_V[min(int(place), last)])
