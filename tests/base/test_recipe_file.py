"""A recipe is strict, tells all its mistakes at once, and survives the way through YAML."""

from pathlib import Path

import pytest

from lorakeet.base.errors import RecipeError
from lorakeet.base.recipe import Recipe
from lorakeet.base.recipe_file import (
    read_recipe,
    recipe_from_dict,
    recipe_to_dict,
    to_commented_yaml,
    to_yaml,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_only_base_and_training_data_are_needed(tmp_path):
    recipe = read_recipe(write(tmp_path, "base: starter\ndata: {train: rows.jsonl}\n"))
    assert recipe.method.kind == "lora"
    assert recipe.data.train[0].path == "rows.jsonl"
    assert recipe.train.early_stopping.patience == 3


def test_all_mistakes_are_told_at_once_with_lines_and_near_names(tmp_path):
    text = (
        "base: starter\n"
        "data:\n  train: rows.jsonl\n  max_token: 64\n"
        "method: {rank: 0}\n"
        "train:\n  learning_rate: fast\n  schedule: cosin\n"
        "epochs: 3\n"
    )
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(tmp_path, text))
    message = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "line 4: 'data.max_token' is no setting. Did you mean 'max_tokens'?" in message
    assert "line 5: 'method.rank'" in message
    assert "line 7: 'train.learning_rate'" in message
    assert "line 8: 'train.schedule'" in message
    assert "line 9: 'epochs' is no setting" in message


def test_a_mistake_in_a_list_of_sources_has_the_line_of_its_entry(tmp_path):
    text = "base: b\ndata:\n  train:\n    - a.jsonl\n    - {path: b.jsonl, wieght: 2}\n"
    with pytest.raises(RecipeError, match=r"line 5: 'data.train.1.wieght'.*'weight'"):
        read_recipe(write(tmp_path, text))


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "base: [1\ndata: 2"])
def test_what_is_not_a_mapping_is_refused(tmp_path, text):
    with pytest.raises(RecipeError):
        read_recipe(write(tmp_path, text))


def test_a_missing_file_says_how_to_write_one(tmp_path):
    with pytest.raises(RecipeError, match="lorakeet new"):
        read_recipe(tmp_path / "absent.yaml")


def test_overrides_win_and_bad_ones_are_told(tmp_path):
    path = write(tmp_path, "base: starter\ndata: {train: rows.jsonl}\n")
    recipe = read_recipe(
        path,
        overrides=[
            "method.rank=32",
            "train.early_stopping=null",
            "train.learning_rate=1e-4",
            "data.train=[a, b]",
        ],
    )
    assert recipe.method.rank == 32
    assert recipe.train.early_stopping is None
    assert recipe.train.learning_rate == 1e-4
    assert [source.path for source in recipe.data.train] == ["a", "b"]
    with pytest.raises(RecipeError, match="section.key=value"):
        read_recipe(path, overrides=["rank"])
    with pytest.raises(RecipeError, match="method.rnk"):
        read_recipe(path, overrides=["method.rnk=2"])


def test_yaml_keeps_words_and_numbers_apart(tmp_path):
    text = "base: no\ndata: {train: rows.jsonl}\ntrain: {learning_rate: 1e-4}\n"
    recipe = read_recipe(write(tmp_path, text))
    assert recipe.base == "no"
    assert recipe.train.learning_rate == 1e-4


def test_the_commented_recipe_reads_back_as_itself(tmp_path):
    recipe = recipe_from_dict(
        {"base": "starter", "data": {"train": ["a.jsonl", "b: c.jsonl"], "labels": ["x", "y"]}}
    )
    text = to_commented_yaml(recipe)
    assert read_recipe(write(tmp_path, text)) == recipe
    for section in ("data", "method", "train", "evaluate"):
        for name in getattr(recipe, section).__class__.model_fields:
            assert f"  {name}: " in text


def test_plain_yaml_reads_back_as_itself(tmp_path):
    recipe = recipe_from_dict({"base": "b", "data": {"train": {"path": "a", "weight": 0.5}}})
    assert read_recipe(write(tmp_path, to_yaml(recipe_to_dict(recipe)))) == recipe


def test_weights_are_for_all_sources_or_none():
    with pytest.raises(RecipeError, match="for all or none"):
        recipe_from_dict({"base": "b", "data": {"train": ["a", {"path": "c", "weight": 1}]}})


def test_sections_stay_small():
    sections = [field.annotation for field in Recipe.model_fields.values()]
    for section in [Recipe, *(s for s in sections if hasattr(s, "model_fields"))]:
        assert len(section.model_fields) <= 20, section.__name__


def test_paths_are_found_beside_the_recipe_first(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "docs").mkdir()
    recipe = read_recipe(
        write(tmp_path, "base: hub/name\ndata: {train: [rows.jsonl, docs, else]}\n")
    )
    assert recipe.base == "hub/name"
    assert [source.path for source in recipe.data.train] == [
        str(tmp_path / "rows.jsonl"),
        str(tmp_path / "docs"),
        "else",
    ]


@pytest.mark.parametrize(("given", "kept"), [(True, "on"), (False, "off"), ("offload", "offload")])
def test_gradient_checkpointing_is_a_word_and_takes_true_and_false(given, kept):
    content = {"base": "x", "data": {"train": "a"}, "train": {"gradient_checkpointing": given}}
    assert recipe_from_dict(content).train.gradient_checkpointing == kept
