"""QLoRA from a recipe to a served model: train, resume, evaluate, merge both ways, serve."""

from __future__ import annotations

import json

import pytest
import torch

from lorakeet.adapters.files import read_adapter
from lorakeet.adapters.targets import linear_names
from lorakeet.api.evaluation import evaluate
from lorakeet.api.session import open_session
from lorakeet.api.shipping import export_merged
from lorakeet.api.training import resume, train
from lorakeet.base.errors import InterruptedRun, RecipeError, RequestError
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.run_folder import RunFolder
from lorakeet.models.load import load_model
from lorakeet.models.trained_form import read_trained_form
from lorakeet.quant.linear import QuantizedLinear
from lorakeet.serve.engine import Engine, EngineLimits
from tests.families import some_ids

ROWS = [{"instruction": f"Who keeps mill {n}?", "output": f"Keeper {n}"} for n in range(12)]


def make_recipe(folder, kind="nf4", **train_settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return recipe_from_dict({
        "base": "starter", "quantization": {"kind": kind},
        "data": {"train": str(path), "validation": 0.2, "max_tokens": 64},
        "method": {"rank": 4},
        "train": {"max_steps": 4, "epochs": 9, "batch_size": 4, "learning_rate": 3e-3,
                  "checkpoint_every_steps": 1, "early_stopping": None} | train_settings,
    })  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished QLoRA run."""
    folder = tmp_path_factory.mktemp("qlora")
    events = []
    trained = train(
        make_recipe(folder), folder / "run", emit=lambda kind, **f: events.append((kind, f))
    )
    return trained, events


def losses(events):
    return [fields["loss"] for kind, fields in events if kind == "step"]


def test_a_run_learns_on_a_base_of_4_bits_and_records_it(run):
    trained, events = run
    assert losses(events)[-1] < losses(events)[0]
    lineage = json.loads((trained.adapter / "lorakeet.json").read_text())
    assert lineage["quantization"] == {
        "kind": "nf4", "block_size": 64, "double": True, "include": "all-linear", "exclude": []
    }  # fmt: skip
    found = [fields for kind, fields in events if kind == "first_batch"]
    assert found


def test_all_linear_layers_are_quantised_and_carry_the_adapter(tmp_path):
    recipe = make_recipe(tmp_path)

    class Data:
        label_names = ()

    session = open_session(recipe, RunFolder(tmp_path / "run"), tmp_path, Data(), print)
    names = linear_names(session.model)
    assert names
    for name in names:
        wrapper = session.model.get_submodule(name)
        assert isinstance(wrapper.base_layer, QuantizedLinear)
        assert name.rpartition(".")[2] not in ("lm_head",)


def test_an_interrupted_run_ends_with_the_same_bytes(run, tmp_path):
    trained, _ = run
    asked = []
    with pytest.raises(InterruptedRun):
        train(
            make_recipe(tmp_path), tmp_path / "run", stop_requested=lambda: len(asked) == 2,
            emit=lambda kind, **f: asked.append(f) if kind == "step" else None,
        )  # fmt: skip
    again = resume(tmp_path / "run")
    name = "adapter_model.safetensors"
    assert (again.adapter / name).read_bytes() == (trained.adapter / name).read_bytes()


def test_evaluation_asks_the_quantised_model(run):
    trained, events = run
    scores = evaluate(trained.folder)
    best = [f for kind, f in events if kind == "run_finished"][0]["values"]["perplexity"]
    assert scores["perplexity"]["tuned"]["perplexity"] == pytest.approx(best, rel=1e-4)
    assert scores["perplexity"]["base"]["perplexity"] > best


def test_merging_takes_the_full_base_and_tells_the_drift(run, tmp_path):
    trained, _ = run
    proof = export_merged(trained.folder, tmp_path / "full")
    assert proof.passed
    assert 0 < proof.figures["drift_max_relative_difference"] < 1
    assert proof.figures["drift_mean_kl"] > 0
    plain, _ = load_model("starter")
    read_adapter(plain, trained.adapter)
    merged, _ = load_model(str(tmp_path / "full"))
    ids = some_ids()
    torch.testing.assert_close(
        merged(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("proof", ["answers", "tensors"])
def test_merging_takes_the_rounded_base_on_request(run, tmp_path, proof):
    trained, _ = run
    found = export_merged(
        trained.folder, tmp_path / "rounded", into="dequantised", proof=proof, dtype="float32"
    )
    assert found.passed
    assert not [name for name in found.figures if name.startswith("drift")]
    model, _ = load_model("starter", quantization=QuantizationSettings(kind="nf4"))
    read_adapter(model, trained.adapter)
    merged, _ = load_model(str(tmp_path / "rounded"))
    ids = some_ids()
    torch.testing.assert_close(
        merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


def test_serving_holds_the_base_as_the_adapter_was_trained(run):
    trained, _ = run
    assert read_trained_form([trained.adapter]).kind == "nf4"
    for form, expected in ((None, "nf4"), (QuantizationSettings(kind="int8"), "int8")):
        engine = Engine(
            "starter", {"mine": trained.adapter}, limits=EngineLimits(quantization=form)
        )
        try:
            layers = [m for m in engine.model.modules() if isinstance(m, QuantizedLinear)]
            assert {layer.kind for layer in layers} == {expected}
        finally:
            engine.close()
    engine = Engine("starter", limits=EngineLimits(quantization=QuantizationSettings()))
    assert not [m for m in engine.model.modules() if isinstance(m, QuantizedLinear)]
    engine.close()


def test_full_training_and_odd_requests_are_refused(run, tmp_path):
    with pytest.raises(RecipeError, match="needs method.kind: lora"):
        recipe_from_dict({
            "base": "starter", "data": {"train": "x"}, "method": {"kind": "full"},
            "quantization": {"kind": "nf4"},
        })  # fmt: skip
    with pytest.raises(RecipeError, match="block_size is 65; known are 64"):
        recipe_from_dict({
            "base": "starter", "data": {"train": "x"},
            "quantization": {"kind": "nf4", "block_size": 65, "exclude": "("},
        })  # fmt: skip
    with pytest.raises(RequestError, match="known are full, dequantised"):
        export_merged(run[0].folder, tmp_path / "x", into="half")
