"""Layers from-to and exclusions, from the recipe to the file and back."""

import json

import pytest
import torch

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.targets import layer_of, select_targets
from lorakeet.base.errors import RequestError
from lorakeet.base.method_settings import MethodSettings
from lorakeet.models.methods import to_lora
from tests.families import build, some_ids

peft = pytest.importorskip("peft")
torch.set_num_threads(1)


def test_the_number_of_a_layer_is_the_first_in_the_name_as_in_peft():
    assert layer_of("model.layers.2.experts.7.up_proj") == 2
    assert layer_of("layers.4.up_proj") == 4 and layer_of("lm_head") is None
    assert layer_of("model.layers.2.experts.7.up_proj", ("experts",)) == 7
    assert layer_of("transformer.h.2.mlp.fc", ("layers", "h")) == 2


def test_a_recipes_layers_are_from_the_first_to_the_last():
    model = build("llama")
    settings = to_lora(MethodSettings(layers=(1, 1), exclude=("k_proj",)), model, task="chat")
    found = select_targets(model, settings)
    assert len(found) == 6 and all(".layers.1." in name for name in found)


@pytest.mark.parametrize("exclude", [("query",), r".*layer\.0\..*"])
def test_a_recipes_exclusions_join_those_of_a_new_head(exclude):
    model = build("roberta")
    method = MethodSettings(targets=("query", "dense"), exclude=exclude)
    settings = to_lora(method, model, task="classify")
    found = select_targets(model, settings)
    assert found and not any("classifier" in name for name in found)
    assert not any("query" in name if isinstance(exclude, tuple) else ".0." in name
                   for name in found)  # fmt: skip


def test_layers_that_the_model_lacks_are_refused_with_the_highest_one():
    with pytest.raises(RequestError, match=r"layers 2, 3: .* highest layer with one is 1"):
        attach(build("llama"), Lora(layers=(1, 2, 3)))
    with pytest.raises(RequestError, match="Only layers 9 were looked at"):
        attach(build("llama"), Lora(layers=(9,)))


def test_the_order_of_patterns_is_kept_in_the_file_as_the_first_match_counts(tmp_path):
    model = build("llama")
    pattern = {"v_proj": 6, "layers.0.self_attn.v_proj": 2}
    attach(model, Lora(rank=2, targets=("v_proj",), alpha_pattern=pattern))
    write_adapter(model, tmp_path / "a", base="none")
    back = build("llama")
    assert list(read_adapter(back, tmp_path / "a").alpha_pattern.items()) == list(pattern.items())
    assert back.get_submodule("model.layers.0.self_attn.v_proj").scales["default"] == 3


@pytest.mark.parametrize("target", ["norm", "rotary_emb", "mlp"])
def test_a_target_that_is_no_layer_is_refused_with_its_kind(target):
    model = build("llama")
    modules = dict(model.named_modules())
    with pytest.raises(RequestError, match="cannot carry a LoRA adapter"):
        attach(model, Lora(rank=2, targets=(target,)))
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_and_exclusions_go_through_files_both_ways(family, tmp_path):
    names = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn", "c_fc")}[family]
    ours = build(family)
    attach(ours, Lora(rank=2, targets=names, layers=(1,), exclude=(names[1],)))
    with torch.no_grad():
        for parameter in adapter_parameters(ours).values():
            parameter.add_(0.1)
    write_adapter(ours, tmp_path / "ours", base="none")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1] and config["exclude_modules"] == [names[1]]
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    answer = ours(input_ids=some_ids()).logits
    assert torch.allclose(theirs(input_ids=some_ids()).logits, answer, atol=1e-5)

    options = {
        "target_modules": list(names),
        "layers_to_transform": 1,
        "layers_pattern": ["layers", "h"],
    }
    made = peft.get_peft_model(
        build(family), peft.LoraConfig(r=2, init_lora_weights=False, **options)
    )
    made.eval().save_pretrained(tmp_path / "theirs")
    back = build(family)
    settings = read_adapter(back, tmp_path / "theirs")
    assert settings.layers == (1,) and settings.layers_pattern == ("layers", "h")
    assert {path.split(".")[2] for path in adapter_parameters(back)} == {"1"}
    expected = made(input_ids=some_ids()).logits
    assert torch.allclose(back(input_ids=some_ids()).logits, expected, atol=1e-5)
