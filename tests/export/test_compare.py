import math

import torch

from lorakeet.export.compare import TOLERANCES, compare_outputs, find_problems
from lorakeet.export.fresh import Outputs

STRICT = TOLERANCES[torch.float32]


def outputs(logits, text="a"):
    return Outputs(prompts=[[1, 2]], logits=[torch.tensor(logits)], texts=[text])


def problems_of(found, expected=None):
    expected = expected or outputs([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]])
    return find_problems(compare_outputs(expected, found), STRICT)


def test_equal_answers_pass_with_all_differences_zero():
    same = outputs([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]])
    figures = compare_outputs(same, same)
    assert figures["max_logit_difference"] == figures["mean_kl"] == 0
    assert figures["top1_agreement"] == 1 and figures["num_positions"] == 2
    assert not problems_of(same)


def test_each_kind_of_difference_is_found():
    assert "logits differ" in problems_of(outputs([[1.0, 2.0, 3.1], [3.0, 1.0, 0.0]]))[0]
    assert any("50.0 %" in p for p in problems_of(outputs([[9.0, 2.0, 3.0], [3.0, 1.0, 0.0]])))
    other_text = outputs([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]], "b")
    assert problems_of(other_text) == ["greedy answers differ"]
    assert "shape" in problems_of(outputs([[1.0, 2.0]]))[0]
    other = Outputs(prompts=[[1, 9]], logits=outputs([[1.0], [1.0]]).logits, texts=["a"])
    assert "tokenizer" in problems_of(other)[0]


def test_nan_never_passes():
    for limits in TOLERANCES.values():
        found = outputs([[math.nan, 2.0, 3.0], [3.0, 1.0, 0.0]])
        figures = compare_outputs(outputs([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]]), found)
        assert find_problems(figures, limits)


def test_a_tie_counts_as_agreement():
    expected, found = outputs([[1.0, 1.0], [0.0, 2.0]]), outputs([[1.0, 1.0 + 1e-7], [0.0, 2.0]])
    assert not problems_of(found, expected)
