"""What a base in few bits is predicted to weigh equals what the built model holds."""

import shutil
from pathlib import Path

import pytest

import lorakeet
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.models.load import load_model
from lorakeet.plan.few_bits import count_quantized
from lorakeet.plan.model_facts import read_model_facts
from lorakeet.quant.linear import QuantizedLinear
from tests.families import build

STARTER = Path(lorakeet.__file__).parent / "embedded" / "starter"
SETTINGS = {
    "all": {},
    "wide blocks without the second step": {"block_size": 128, "double": False},
    "only the feed-forward part": {"include": ["mlp"]},
    "an expression": {"include": r".*\.1\..*(q|down)_proj"},
    "not the first layer": {"exclude": ["layers.0"]},
    "the head too": {"include": r".*_proj|lm_head"},
}


def write_base(family, folder):
    build(family).save_pretrained(folder)
    for path in STARTER.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return read_model_facts(folder)


def bytes_of(model):
    """Codes and scales of all layers in few bits; the shared table of levels is not a layer's."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    names = [(module, name) for module in layers for name, _ in module.named_buffers(recurse=False)]
    tensors = [getattr(module, name) for module, name in names if name != "scale_levels"]
    return len(layers), sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_the_patterns_choose_the_predicted_layers_and_bytes(setting, kind, tmp_path):
    facts = write_base("llama", tmp_path)
    settings = QuantizationSettings(kind=kind, cache="none", **SETTINGS[setting])
    model, _ = load_model(str(tmp_path), quantization=settings, dtype="float32")
    found = count_quantized(facts, settings, "lora-8bit" if kind == "int8" else "qlora")
    num_layers, num_bytes = bytes_of(model)
    assert found.num_layers == num_layers
    # scales of scales are whole blocks of 256 and an offset a layer, which small layers show
    assert found.num_bytes == pytest.approx(num_bytes, rel=0.01, abs=10 * num_layers)


def test_a_tied_head_keeps_its_bytes(tmp_path):
    facts = write_base("llama-tied", tmp_path)
    settings = QuantizationSettings(kind="nf4", include=r".*_proj|lm_head")
    assert count_quantized(facts, settings, "qlora").num_layers == 14
