"""Adapters compared from their factors give what the full matrices give."""

from dataclasses import replace

import pytest
import torch

from lorakeet.adapters.combination import Combination
from lorakeet.adapters.combine import combine
from lorakeet.adapters.compare import compare_adapters, measure_norms, measure_overlap, sum_up
from lorakeet.adapters.stored import read_stored
from lorakeet.base.errors import RequestError
from tests.adapters.test_combine import changes_of, make

torch.set_num_threads(1)


def compare(one, other):
    return compare_adapters(read_stored(one), read_stored(other))


def test_the_figures_are_those_of_the_full_matrices(tmp_path):
    a, b = make(tmp_path / "a", 1, rank=3, rslora=True), make(tmp_path / "b", 2, rank=5)
    one, other = changes_of(a), changes_of(b)
    found = compare(a, b)
    for module, row in found.items():
        D1, D2 = one[module], other[module]
        assert row.ranks == (3, 5)
        assert row.norms == pytest.approx((float(D1.norm()), float(D2.norm())))
        assert row.distance == pytest.approx(float((D1 - D2).norm()))
        cosine = float((D1 * D2).sum() / (D1.norm() * D2.norm()))
        assert row.cosine == pytest.approx(cosine, abs=1e-12)
        U1, U2 = (torch.linalg.svd(D).U[:, :r] for D, r in ((D1, 3), (D2, 5)))
        V1, V2 = (torch.linalg.svd(D).Vh[:r].T for D, r in ((D1, 3), (D2, 5)))
        for space, left, right in ((row.outputs, U1, U2), (row.inputs, V1, V2)):
            assert space.phi == pytest.approx(float((left.T @ right).square().sum()) / 3, abs=1e-9)
            assert space.chance == 5 / left.shape[0] and len(space.angles) == 3
    whole = sum_up(found)
    flat = [torch.cat([each[m].flatten() for m in found]) for each in (one, other)]
    assert whole.norms == pytest.approx(tuple(float(each.norm()) for each in flat))
    assert whole.distance == pytest.approx(float((flat[0] - flat[1]).norm()))
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert whole.cosine == pytest.approx(float(cosine), abs=1e-12)
    assert measure_norms(read_stored(a)) == {m: row.norms[0] for m, row in found.items()}


def test_an_adapter_and_its_double_differ_in_strength_only(tmp_path):
    a = make(tmp_path / "a", 1)
    combine([a], tmp_path / "b", Combination(kind="linear", weights=(-2.0,)))
    for row in compare(a, tmp_path / "b").values():
        assert row.cosine == pytest.approx(-1) and row.distance == pytest.approx(3 * row.norms[0])
        assert row.inputs.phi == pytest.approx(1) and row.outputs.phi == pytest.approx(1)
        assert max(row.outputs.angles) < 0.1


def test_overlap_by_hand():
    plane = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]], dtype=torch.float64)
    tilted = torch.tensor([[0.0], [3**0.5], [1], [0]], dtype=torch.float64)
    found = measure_overlap(plane, tilted)
    assert found.phi == pytest.approx(0.75) and found.angles == pytest.approx((30.0,))
    assert found.chance == 0.5
    assert measure_overlap(plane, torch.zeros(4, 2, dtype=torch.float64)) is None
    repeated = torch.cat([tilted, 2 * tilted], dim=1)
    assert measure_overlap(repeated, plane).phi == pytest.approx(0.75)


def test_random_spaces_overlap_by_chance():
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 40, 4, generator=generator).double() for _ in range(200)]
    found = [measure_overlap(*draw) for draw in draws]
    mean = sum(each.phi for each in found) / len(found)
    assert mean == pytest.approx(found[0].chance, rel=0.05)


def test_a_layer_of_one_adapter_alone_is_all_difference(tmp_path):
    a = make(tmp_path / "a", 1, targets=("q_proj",))
    b = make(tmp_path / "b", 2, targets=("q_proj", "k_proj"))
    row = compare(a, b)["model.layers.1.self_attn.k_proj"]
    assert row.ranks == (0, 4) and row.norms[0] == 0 and row.distance == row.norms[1] > 0
    assert row.cosine is None and row.inputs is None


def test_adapters_of_different_bases_are_not_compared(tmp_path):
    a = make(tmp_path / "a", 1, "gpt2", targets=("c_attn", "c_proj"))
    one = read_stored(a)
    layers = dict(one.layers)
    name = "transformer.h.0.attn.c_proj"
    layers[name] = one.layers["transformer.h.0.attn.c_attn"]
    with pytest.raises(RequestError, match=r"h\.0\.attn\.c_proj: the sizes differ"):
        compare_adapters(one, replace(one, layers=layers))
