"""Training that goes on from an adapter, through the real command and interface."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorakeet.api.adapters import list_adapters
from lorakeet.api.continuing import describe_parent
from lorakeet.api.evaluation import evaluate
from lorakeet.api.rerun import find_changed_inputs
from lorakeet.api.resolve import read_resolved, to_recipe
from lorakeet.api.training import train
from lorakeet.base.errors import DataError, RecipeError, RequestError
from lorakeet.base.recipe_file import recipe_from_dict, to_yaml
from lorakeet.base.run_folder import RunFolder, read_json, sha256_file
from lorakeet.cli.app import APP
from lorakeet.export.merged import MergeOrder, write_merged

torch.set_num_threads(1)
WEIGHTS = "adapter_model.safetensors"


def make_recipe(folder, name, **method):
    rows = [{"instruction": f"Who keeps {name} {n}?", "output": f"Keeper {n}"} for n in range(6)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": "starter", "data": {"train": str(path), "validation": 0.3, "max_tokens": 64},
        "method": method, "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 5e-3},
        "evaluate": {"max_new_tokens": 2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A short run whose adapter has no default settings."""
    folder = tmp_path_factory.mktemp("parent")
    method = {
        "rank": 3,
        "alpha": 5,
        "targets": ["q_proj", "v_proj"],
        "rslora": True,
        "layers": [0, 0],
    }
    train(make_recipe(folder, "mill", **method), folder / "run")
    return folder / "run"


def test_an_adapter_is_trained_further_on_new_data_and_names_its_parent(parent, tmp_path):
    recipe = make_recipe(tmp_path, "well", adapter=str(parent))
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    command = ["train", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run"), "--json"]
    done = CliRunner().invoke(APP, command)
    assert done.exit_code == 0, done.output
    new, old = tmp_path / "run" / "adapter", parent / "adapter"
    before, after = (load_file(folder / WEIGHTS) for folder in (old, new))
    assert before.keys() == after.keys()
    assert all(t.shape == before[key].shape for key, t in after.items())
    assert any(not torch.equal(t, before[key]) for key, t in after.items())
    configs = [read_json(folder / "adapter_config.json") for folder in (old, new)]
    for key in ("r", "lora_alpha", "use_rslora", "target_modules"):
        assert configs[0][key] == configs[1][key]
    (said,) = read_json(new / "lorakeet.json")["parents"]
    assert said["folder"] == str(old) and said["sha256"][WEIGHTS] == sha256_file(old / WEIGHTS)
    line = next(each for each in list_adapters(tmp_path / "run") if each.folder == "adapter")
    assert line.parents == (str(old),)

    method = read_resolved(RunFolder(tmp_path / "run"))["recipe"]["method"]
    assert method["rank"] == 3 and method["adapter"] == str(old)
    proof = write_merged(MergeOrder(base="starter", adapter_folder=new), tmp_path / "merged")
    assert proof.passed
    assert evaluate(tmp_path / "run")


def test_a_rerun_tells_that_the_parent_is_another_one(parent, tmp_path):
    recipe = to_recipe(make_recipe(tmp_path, "well", adapter=str(parent)))
    past = {"hashes": describe_parent(recipe)}
    assert "continued" not in str(find_changed_inputs(past, "starter"))
    past["hashes"]["parents"][0]["sha256"][WEIGHTS] = "0" * 64
    assert "not the one that was continued" in str(find_changed_inputs(past, "starter"))


def test_the_first_step_starts_where_the_parent_ended(parent, tmp_path):
    recipe = make_recipe(tmp_path, "mill", adapter=str(parent / "adapter"))
    losses = []

    def hear(kind, **fields):
        if kind == "step":
            losses.append(fields["loss"])

    train(recipe, tmp_path / "on", emit=hear)
    train({**recipe, "method": {}}, tmp_path / "new", emit=hear)
    assert losses[0] < losses[2]


def test_every_setting_that_contradicts_the_adapter_is_told(parent, tmp_path):
    told = {"rank": 4, "targets": "all-linear", "start": "pissa", "alpha": 5}
    with pytest.raises(RecipeError) as caught:
        to_recipe(make_recipe(tmp_path, "well", adapter=str(parent), **told))
    text = str(caught.value)
    for words in ("method.rank is 4", "has 3", "method.targets is all-linear", "method.start"):
        assert words in text
    assert "alpha" not in text
    with pytest.raises(RecipeError, match="adapter needs kind: lora"):
        recipe_from_dict(make_recipe(tmp_path, "well", adapter=str(parent), kind="full"))


def test_an_adapter_of_another_base_is_refused(parent, tmp_path):
    lineage = parent / "adapter" / "lorakeet.json"
    kept = lineage.read_text()
    lineage.write_text(json.dumps({**json.loads(kept), "base_weights_sha256": "0" * 64}))
    try:
        with pytest.raises(DataError, match="trained on starter.*other weights"):
            train(make_recipe(tmp_path, "well", adapter=str(parent)), tmp_path / "run")
        with pytest.raises(DataError, match="other weights.*--other-base"):
            evaluate(parent)
    finally:
        lineage.write_text(kept)


def test_training_goes_on_in_few_bits_and_a_repair_of_bits_stays_in_them(parent, tmp_path):
    alarms = []

    def hear(kind, **fields):
        alarms.extend([fields["code"]] if kind == "alarm" else [])

    few = {"quantization": {"kind": "nf4"}}
    train(
        {**make_recipe(tmp_path, "well", adapter=str(parent)), **few}, tmp_path / "few", emit=hear
    )
    assert (
        read_json(tmp_path / "few" / "adapter" / "lorakeet.json")["quantization"]["kind"] == "nf4"
    )
    first = {**make_recipe(tmp_path, "mill", start="loftq", rank=3, targets="q_proj"), **few}
    train(first, tmp_path / "repair", emit=hear)
    further = make_recipe(tmp_path, "well", adapter=str(tmp_path / "repair"))
    train({**further, **few}, tmp_path / "more", emit=hear)
    assert read_json(tmp_path / "more" / "adapter" / "lorakeet.json")["start"] == "loftq"
    with pytest.raises(RequestError, match="LoftQ.*held in full"):
        train(further, tmp_path / "full")
    assert "unlike-base" not in alarms


def test_targets_that_do_not_fit_the_base_are_told_before_anything_is_read(tmp_path):
    with pytest.raises(RequestError, match="rank 5000 is larger than this"):
        train(make_recipe(tmp_path, "well", rank=5000), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()
