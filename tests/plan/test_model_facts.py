"""Parameters counted from config.json equal those that transformers builds."""

import json

import pytest
import torch
import transformers as t
from tests.families import ALL, ENCODERS, build

from lorakeet.adapters.attach import attach
from lorakeet.adapters.layer import Lora
from lorakeet.base.errors import FileFormatError
from lorakeet.plan.memory import count_adapter_parameters
from lorakeet.plan.model_facts import read_model_facts

LARGE = {
    "llama-3-8b": (t.LlamaForCausalLM, t.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256)),
    "qwen2.5-0.5b": (t.Qwen2ForCausalLM, t.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)),
    "phi-3-mini": (t.Phi3ForCausalLM, t.Phi3Config()),
    "gemma-3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig()),
    "falcon-new": (t.FalconForCausalLM, t.FalconConfig(new_decoder_architecture=True,
                                                       num_kv_heads=8)),
}  # fmt: skip


def facts_of(model, folder, num_labels=None):
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    return read_model_facts(folder, num_labels=num_labels)


@pytest.mark.parametrize("family", list(ALL))
def test_tiny_models_are_counted_to_the_last_parameter(family, tmp_path):
    model = build(family)
    facts = facts_of(model, tmp_path, num_labels=3 if family in ENCODERS else None)
    assert facts.parameters == model.num_parameters()


@pytest.mark.parametrize("name", list(LARGE))
def test_large_models_are_counted_to_the_last_parameter(name, tmp_path):
    model_class, config = LARGE[name]
    with torch.device("meta"):
        model = model_class(config)
    assert facts_of(model, tmp_path).parameters == model.num_parameters()


@pytest.mark.parametrize("family", list(ALL))
def test_adapter_parameters_equal_what_is_attached(family, tmp_path):
    model = build(family)
    facts = facts_of(model, tmp_path)
    report = attach(model, Lora(rank=4))
    assert count_adapter_parameters(facts, 4, "all-linear", {}) == report.trained_parameters


def test_an_unknown_architecture_is_counted_from_its_weights_or_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "new", "hidden_size": 8, "num_hidden_layers": 1})
    )
    with pytest.raises(FileFormatError, match="'new' is not known"):
        read_model_facts(tmp_path)
    save_file({"a.q.weight": torch.zeros(8, 4), "embed.weight": torch.zeros(9, 8)},
              tmp_path / "model.safetensors")  # fmt: skip
    facts = read_model_facts(tmp_path)
    assert facts.parameters == 32 + 72
    assert [layer.name for layer in facts.linear] == ["a.q"]
