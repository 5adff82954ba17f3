"""The section ``method`` of a recipe: what contradicts itself is told, all of it at once."""

import pytest

from lorakeet.base.errors import RecipeError
from lorakeet.base.recipe_file import recipe_from_dict


def read(**method):
    return recipe_from_dict({"base": "x", "data": {"train": "a.jsonl"}, "method": method}).method


def test_every_contradiction_is_told_at_once():
    with pytest.raises(RecipeError) as caught:
        read(
            kind="full", dora=True, rslora=True, start="pissa", lora_plus_ratio=16,
            rank_pattern={"q_proj": 0}, alpha_pattern={"k_proj": 0}, layers=[3, 1],
            exclude=["q_proj"],
        )  # fmt: skip
    text = str(caught.value)
    for words in (
        "dora needs kind: lora", "rslora needs kind: lora", "start needs kind: lora",
        "layers is [3, 1]", "exclude needs kind: lora",
        "lora_plus_ratio needs kind: lora", "gives q_proj rank 0", "gives k_proj alpha 0",
    ):  # fmt: skip
        assert words in text


def test_an_unknown_start_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match="'default', 'pissa', 'pissa-fast' or 'loftq'"):
        read(start="svd")


def test_vera_has_no_alpha_and_none_of_the_options_that_change_a_and_b():
    with pytest.raises(RecipeError) as caught:
        read(vera=True, alpha=16, dora=True, lora_plus_ratio=16, rank_pattern={"q_proj": 4})
    for key in ("alpha", "dora", "lora_plus_ratio", "rank_pattern"):
        assert f"vera shares one A and B, so {key} cannot be set" in str(caught.value)
    kept = read(vera=True, rank=512)
    assert read(**kept.model_dump()) == kept  # as a run's resolved.yaml gives it back


def test_a_module_is_not_adapted_and_trained_in_full_and_something_must_be_adapted():
    with pytest.raises(RecipeError, match="lm_head stands in targets and in modules_to_save"):
        read(targets=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    with pytest.raises(RecipeError, match="targets is empty"):
        read(targets=[])
