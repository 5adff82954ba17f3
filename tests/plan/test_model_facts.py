"""Parameters counted from config.json equal those that transformers builds."""

import json

import pytest
import torch
import transformers as t

from lorakeet.plan.families import FAMILIES
from lorakeet.plan.model_facts import read_model_facts
from tests.families import ALL, ENCODERS, build
from tests.plan.configs import (
    CASES,
    OPTIONS,
    WITHOUT_LANGUAGE_HEAD,
    build_empty,
    random_config,
    write_config,
)

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


def sizes_of(model):
    """Module name -> the parameters that it holds itself."""
    found = {}
    for name, parameter in model.named_parameters():
        module = name.rsplit(".", 1)[0]
        found[module] = found.get(module, 0) + parameter.numel()
    return found


def sizes_in(facts):
    found = {}
    for part in facts.parts:
        for name in part.names():
            found[name] = found.get(name, 0) + part.weights - part.num_tied
    return {name: size for name, size in found.items() if size}


def test_every_known_family_is_tried():
    assert set(OPTIONS) == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "seed"), [case for case in CASES if case[0] not in WITHOUT_LANGUAGE_HEAD]
)
def test_language_models_are_counted_module_by_module(family, seed, tmp_path):
    config = random_config(family, seed)
    model = build_empty(config, None)
    write_config(tmp_path, config)
    facts = read_model_facts(tmp_path)
    assert facts.parameters == model.num_parameters()
    assert sizes_in(facts) == sizes_of(model)


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_classifiers_are_counted_module_by_module(family, seed, tmp_path):
    config = random_config(family, seed)
    model = build_empty(config, 3)
    write_config(tmp_path, config)
    facts = read_model_facts(tmp_path, num_labels=3)
    assert facts.parameters == model.num_parameters()
    assert sizes_in(facts) == sizes_of(model)


@pytest.mark.parametrize("family", list(OPTIONS))
def test_a_config_without_sizes_has_the_familys_own(family, tmp_path):
    config = {"model_type": family}
    write_config(tmp_path, config)
    facts = read_model_facts(tmp_path, num_labels=2)
    assert facts.parameters == build_empty(config, 2).num_parameters()


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


def test_an_unknown_architecture_is_counted_from_its_weights(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "new", "text_config": {"hidden_size": 8, "num_layers": 1}})
    )
    save_file({"a.q.weight": torch.zeros(8, 4), "a.q.bias": torch.zeros(8),
               "embed.weight": torch.zeros(9, 8), "lm_head.weight": torch.zeros(9, 8)},
              tmp_path / "model.safetensors")  # fmt: skip
    facts = read_model_facts(tmp_path)
    assert facts.parameters == 32 + 8 + 72 + 72
    assert [part.path for part in facts.parts if part.kind == "linear"] == ["a.q"]
    assert facts.multiplied == 32 + 72
    classifier = read_model_facts(tmp_path, num_labels=3)
    assert classifier.parameters == 32 + 8 + 72 + 3 * 8


def test_a_token_meets_only_the_experts_that_it_is_sent_to(tmp_path):
    config = {"model_type": "mixtral", "hidden_size": 8, "intermediate_size": 16, "vocab_size": 10,
              "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
              "num_local_experts": 8, "num_experts_per_tok": 2}  # fmt: skip
    write_config(tmp_path, config)
    facts = read_model_facts(tmp_path)
    assert facts.multiplied == 4 * 64 + 2 * (3 * 8 * 16) + 80
    assert (facts.ffn, facts.is_gated) == (2 * 16, True)


def test_experts_of_an_unknown_architecture_are_told_from_its_linear_layers(tmp_path):
    from safetensors.torch import save_file

    write_config(tmp_path, {"model_type": "new", "hidden_size": 4, "num_hidden_layers": 1,
                            "num_experts_per_tok": 1, "n_routed_experts": 4})  # fmt: skip
    names = [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in range(4)]
    weights = {name: torch.zeros(8, 4) for name in names}
    save_file({**weights, "q_proj.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    facts = read_model_facts(tmp_path)
    assert facts.parameters == 4 * 32 + 16
    assert facts.linear_parameters == 16
    assert facts.multiplied == 32 + 16
