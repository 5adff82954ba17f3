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
