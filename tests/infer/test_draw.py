"""Drawn tokens follow the distribution that the settings leave."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lorakeet.base.errors import NumericsError, RequestError
from lorakeet.infer.draw import draw_token, draw_tokens
from lorakeet.infer.sampling import SamplingSettings

LOGITS = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05]).log()


def draw_many(settings, times=4000):
    generator = torch.Generator().manual_seed(1)
    counts = Counter(draw_token(LOGITS, settings, generator) for _ in range(times))
    return {token: count / times for token, count in counts.items()}


def test_frequencies_are_the_probabilities():
    shares = draw_many(SamplingSettings(temperature=1.0))
    for token, probability in enumerate((0.1, 0.4, 0.3, 0.15, 0.05)):
        assert shares[token] == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens():
    squared = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05]).square()
    shares = draw_many(SamplingSettings(temperature=0.5))
    assert shares[1] == pytest.approx(float(squared[1] / squared.sum()), abs=0.03)


def test_top_k_and_top_p_leave_the_likeliest_only():
    assert set(draw_many(SamplingSettings(temperature=1.0, top_k=2))) == {1, 2}
    assert set(draw_many(SamplingSettings(temperature=1.0, top_p=0.71))) == {1, 2, 3}
    assert set(draw_many(SamplingSettings(temperature=1.0, top_p=0.01))) == {1}


def test_a_batch_mixes_greedy_and_drawn_rows():
    rows = [SamplingSettings(), SamplingSettings(temperature=9.0, seed=2)]
    generators = [torch.Generator().manual_seed(row.seed) for row in rows]
    drawn = {tuple(draw_tokens(LOGITS.repeat(2, 1), rows, generators)) for _ in range(50)}
    assert {first for first, _ in drawn} == {1}
    assert len({second for _, second in drawn}) > 2


def test_nan_logits_are_an_error_not_a_token():
    with pytest.raises(NumericsError, match="NaN"):
        draw_tokens(LOGITS[None] * float("nan"), [SamplingSettings()], [torch.Generator()])


def test_settings_out_of_range_are_all_named():
    with pytest.raises(RequestError, match="temperature is -1.*top_p is 0.*stop string"):
        SamplingSettings(temperature=-1, top_p=0, stop=("",))
