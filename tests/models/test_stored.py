"""A base read as stored answers as the one that transformers loads, in every family."""

import shutil

import pytest
import torch
from torch import nn

from lorakeet.adapters.attach import attach
from lorakeet.adapters.settings import Lora
from lorakeet.base.errors import FileFormatError
from lorakeet.models.load import EMBEDDED_STARTER, load_model
from lorakeet.models.narrow import narrow_frozen
from lorakeet.quant.narrow import NARROW
from tests.families import ALL, ENCODERS, build, some_ids

OWN = ("gpt2", "falcon")  # their linear layers are no nn.Linear


@pytest.fixture
def save(tmp_path):
    """Writes a family's model with a tokenizer, and says how to load it."""

    def write(family, dtype=torch.bfloat16):
        build(family).to(dtype).save_pretrained(tmp_path)
        for path in EMBEDDED_STARTER.glob("*token*"):
            shutil.copy(path, tmp_path)
        labels = ("a", "b", "c") if family in ENCODERS else ()
        return {"base": str(tmp_path), "task": "classify" if labels else "chat",
                "label_names": labels}  # fmt: skip

    return write


def narrow_weights(model):
    return [m for m in model.modules() if type(m) is nn.Linear and m.weight.dtype in NARROW]


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_answers_buffers_and_dtypes_are_those_of_the_wide_load(save, family):
    how = save(family)
    (wide, _), (stored, _) = load_model(**how), load_model(**how, as_stored=True)
    assert not narrow_weights(wide) and bool(narrow_weights(stored)) == (family not in OWN)
    for model in (wide, stored):
        attach(model, Lora(rank=4), seed=1)
        assert narrow_frozen(model) >= 1
    assert not any(p.dtype in NARROW for p in stored.parameters())
    found = [{name: (b.dtype, b.float().sum()) for name, b in model.named_buffers()}
             for model in (wide, stored)]  # fmt: skip
    assert found[0] == found[1]
    ids = some_ids()
    assert torch.equal(wide(input_ids=ids)[0], stored(input_ids=ids)[0])


@torch.no_grad()
def test_what_is_saved_or_left_out_is_widened(save):
    how = save("llama")
    (model, _) = load_model(**how, as_stored=True)
    (wide, _) = load_model(**how)
    settings = Lora(rank=4, targets=("q_proj",), modules_to_save=("lm_head", "k_proj"))
    for each in (model, wide):
        attach(each, settings, seed=1)
        narrow_frozen(each)
    layer = model.model.layers[0].self_attn
    assert layer.k_proj.modules_to_save["default"].weight.dtype == torch.float32
    assert torch.equal(model(input_ids=some_ids())[0], wide(input_ids=some_ids())[0])


def test_a_float32_checkpoint_and_a_new_head_are_read_as_ever(save, tmp_path):
    how = save("llama", torch.float32)
    assert not narrow_weights(load_model(**how, as_stored=True)[0])
    (classifier, _) = load_model(str(tmp_path), task="classify", label_names=("a", "b"),
                                 as_stored=True)  # fmt: skip
    assert classifier.score.weight.dtype == torch.float32
    how = save("llama")
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="damaged"):
        load_model(**how, as_stored=True)
