"""Sizes against cards: the shapes are the real ones, and a larger card never fits less."""

import pytest

from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.units import GIB
from lorakeet.plan.hardware import Hardware
from lorakeet.plan.sizes import CARDS_GIB, EXACT_FIRST, build_shape, plan_sizes

HERE = Hardware(cores=2, memory_bytes=24 * GIB, free_memory_bytes=20 * GIB, disk_free_bytes=GIB)
# as the models' cards tell them, in billions
PUBLISHED = {"0.5B": 0.494, "1.5B": 1.544, "3B": 3.086, "7B": 7.616, "14B": 14.77, "32B": 32.76,
             "70B": 70.55}  # fmt: skip


@pytest.fixture(scope="module")
def sizes():
    recipe = recipe_from_dict({
        "base": "x", "data": {"train": "a.jsonl", "max_tokens": 512},
        "train": {"micro_batch_tokens": 512},
    })  # fmt: skip
    return {size.size: size for size in plan_sizes(recipe, HERE)}


def test_shapes_have_the_published_numbers_of_parameters():
    for size, billions in PUBLISHED.items():
        assert build_shape(size).parameters / 1e9 == pytest.approx(billions, rel=2e-3), size


def test_a_larger_card_allows_a_more_exact_method_and_a_larger_model_a_less_exact_one(sizes):
    order = [*EXACT_FIRST, None]
    for size in sizes.values():
        ranks = [order.index(size.on_cards[card]) for card in CARDS_GIB]
        assert ranks == sorted(ranks, reverse=True), size.size
    for card in CARDS_GIB:
        ranks = [order.index(size.on_cards[card]) for size in sizes.values()]
        assert ranks == sorted(ranks), card


def test_what_fits_is_what_is_known_to_fit(sizes):
    assert sizes["7B"].on_cards[24] == "lora" and sizes["7B"].on_cards[80] in ("lora", "full")
    assert sizes["7B"].on_cards[8] in ("qlora", None) and sizes["7B"].on_cards[12] == "qlora"
    assert sizes["70B"].on_cards[48] in ("qlora", None) and sizes["70B"].on_cards[24] is None
    assert sizes["0.5B"].on_cards[8] is not None


def test_a_method_is_named_only_where_its_bytes_fit_and_the_json_is_plain(sizes):
    for size in sizes.values():
        for card, kind in size.on_cards.items():
            fitting = [k for k in EXACT_FIRST if size.needed_bytes[k] <= 0.9 * card * GIB]
            assert kind == (fitting[0] if fitting else None)
        assert set(size.to_dict()["on_cards"]) == {str(card) for card in CARDS_GIB}
