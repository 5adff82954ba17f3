"""Mixed widths from a recipe: measured once, recorded, and the same wherever the base is held."""

from __future__ import annotations

import json

import pytest
import torch

from lorakeet.api.resolve import recipe_of_run
from lorakeet.api.training import train
from lorakeet.base.errors import RecipeError, RequestError
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.run_folder import RunFolder
from lorakeet.models.load import load_model
from lorakeet.models.trained_form import read_trained_form
from lorakeet.quant.linear import QuantizedLinear

ROWS = [{"instruction": f"Who keeps mill {n}?", "output": f"Keeper {n}"} for n in range(12)]
BITS = 5.5


def make_recipe(folder, **quantization):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return recipe_from_dict({
        "base": "starter",
        "quantization": {"kind": "mixed", "bits_per_weight": BITS, "calibration_rows": 4}
        | quantization,
        "data": {"train": str(path), "validation": 0, "max_tokens": 64},
        "method": {"rank": 2},
        "train": {"max_steps": 1, "batch_size": 4, "early_stopping": None},
    })  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run and the cache that it filled."""
    folder = tmp_path_factory.mktemp("mixed")
    trained = train(make_recipe(folder, cache=str(folder / "cache")), folder / "run")
    return RunFolder(trained.folder), folder / "cache"


def held_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def test_the_widths_are_measured_recorded_and_within_the_budget(run):
    folder, _ = run
    told = json.loads(folder.widths.read_text())
    settings = recipe_of_run(folder).quantization
    assert settings.widths == {name: layer["width"] for name, layer in told["layers"].items()}
    assert len(set(settings.widths.values())) > 1
    assert all(layer["cost"][layer["width"]] >= 0 for layer in told["layers"].values())
    model, _ = load_model("starter", quantization=settings)
    layers = held_layers(model)
    bits = 8 * sum(m.held_bytes for m in layers.values()) / sum(
        m.num_weights for m in layers.values()
    )  # fmt: skip
    assert bits == pytest.approx(told["bits_per_weight"], rel=1e-6)
    assert 0.95 * BITS < bits <= BITS
    plan = json.loads(folder.plan.read_text())
    methods = {method["kind"]: method["bytes"]["weights"] for method in plan["methods"]}
    assert methods["qlora"] < methods["lora-8bit"]


def test_the_adapter_and_the_cache_hold_the_base_in_the_same_widths(run):
    folder, _ = run
    settings = recipe_of_run(folder).quantization
    form = read_trained_form([folder.adapter])
    assert form.widths == settings.widths
    again, _ = load_model("starter", quantization=settings)  # mapped from the run's cache
    plain, _ = load_model("starter", quantization=form)  # that leaves no cache
    for name, layer in held_layers(again).items():
        other = plain.get_submodule(name)
        assert layer.kind == other.kind and layer.block_size == other.block_size
        assert torch.equal(layer.codes, other.codes)


def test_another_run_takes_the_widths_from_the_cache(run, tmp_path):
    _, cache = run
    (kept,) = cache.glob("*-widths-*.json")
    content = json.loads(kept.read_text())
    name = next(iter(content["layers"]))
    content["layers"][name]["width"] = "none"
    kept.write_text(json.dumps(content))
    rows = cache.parent
    second = train(make_recipe(rows, cache=str(cache)), tmp_path / "second")
    assert recipe_of_run(RunFolder(second.folder)).quantization.widths[name] == "none"


def test_inputs_in_8_bits_are_for_inference_alone(tmp_path):
    model, _ = load_model("starter", quantization="int8-activations")
    assert all(layer.rounds_inputs for layer in held_layers(model).values())
    with pytest.raises(ValueError, match="activations int8 needs kind int8"):
        QuantizationSettings(kind="nf4", activations="int8")
    with pytest.raises(RecipeError, match="serve with --quantization int8-activations"):
        make_recipe(tmp_path, kind="int8", activations="int8")


def test_widths_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(RequestError, match="widths is empty. 'lorakeet train' measures it"):
        load_model("starter", quantization="mixed")
    stray = QuantizationSettings(kind="mixed", widths={"model.layers.77.mlp": "nf4"})
    with pytest.raises(RequestError, match="such as model.layers.77.mlp"):
        load_model("starter", quantization=stray)
    with pytest.raises(ValueError, match="widths holds a: int4"):
        QuantizationSettings(kind="mixed", widths={"a": "int4"})
    with pytest.raises(ValueError, match="widths belong to kind mixed"):
        QuantizationSettings(kind="nf4", widths={"a": "int8"})
    with pytest.raises(RequestError, match="Raise quantization.bits_per_weight"):
        train(make_recipe(tmp_path, bits_per_weight=4.01), tmp_path / "run")
