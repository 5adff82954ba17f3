"""LoftQ's start takes back part of what rounding took, and all of a run knows of it."""

from __future__ import annotations

import pytest
import torch

from lorakeet.adapters.attach import adapter_parameters, no_adapter
from lorakeet.adapters.experts import layer_names
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.base.errors import RecipeError, RequestError
from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.models.load import load_model
from lorakeet.models.methods import apply_method
from lorakeet.quant.linear import QuantizedLinear
from tests.models.test_quantized import answer, settings, write_base

torch.set_num_threads(1)
FAMILIES = ["llama", "gpt2", "gemma2"]


def started(folder, kind="nf4", rank=8, **options):
    model, _ = load_model(str(folder), quantization=settings(kind))
    method = MethodSettings(rank=rank, alpha=16, start="loftq", **options)
    apply_method(model, method, task="chat", seed=0, base=str(folder))
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_every_layer_falls_to_the_least_of_its_rank(family, kind, tmp_path):
    full = write_base(tmp_path, family)
    model = started(tmp_path, kind)
    layers = [(p, m) for p, m in layer_names(model) if isinstance(m.base_layer, QuantizedLinear)]
    assert layers
    for path, layer in layers:
        W = full.get_submodule(path).weight.detach()
        W = W.T if family == "gpt2" else W
        before = W - layer.base_matrix()
        after = W - layer.direction("default")
        least = torch.linalg.svdvals(before)[8:].norm()
        assert before.norm() > 1.05 * least, path
        assert after.norm() <= 1.01 * least + 1e-7, path


@pytest.mark.parametrize("dora", [False, True])
def test_step_0_is_nearer_to_the_full_base(dora, tmp_path):
    wanted = answer(write_base(tmp_path, "llama").eval())
    model = started(tmp_path, dora=dora)
    repaired = (answer(model) - wanted).norm()
    with no_adapter(model):
        rounded = (answer(model) - wanted).norm()
    assert repaired < 0.9 * rounded


def test_the_file_is_plain_lora_on_the_quantised_base(tmp_path):
    write_base(tmp_path / "base", "llama")
    model = started(tmp_path / "base")
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.01)
    write_adapter(model, tmp_path / "a", base="base")
    again, _ = load_model(str(tmp_path / "base"), quantization=settings())
    assert read_adapter(again, tmp_path / "a").start == "default"
    assert torch.equal(answer(again), answer(model))


def test_a_base_without_full_weights_or_without_rounding_is_refused(tmp_path):
    from lorakeet.models.quantized_cache import write_cache

    write_base(tmp_path / "base", "llama")
    model, tokenizer = load_model(str(tmp_path / "base"), quantization=settings())
    write_cache(model, tmp_path / "few", tmp_path / "base", settings())
    tokenizer.save_pretrained(tmp_path / "few")
    with pytest.raises(RequestError, match="quantised already.*full-precision"):
        started(tmp_path / "few", "none")
    with pytest.raises(RecipeError, match="loftq repairs.*quantization.kind is off"):
        recipe_from_dict({"base": "b", "data": {"train": "x"}, "method": {"start": "loftq"}})
