"""What a recipe is predicted to train equals what the method attaches to the built model."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from lorakeet.base.errors import RequestError
from lorakeet.base.method_settings import MethodSettings
from lorakeet.models.methods import apply_method
from lorakeet.plan.model_facts import read_model_facts
from lorakeet.plan.trained import count_trained
from tests.families import DECODERS, ENCODERS, build

SETTINGS = {
    "attention": {"targets": ["q_proj", "v_proj"]},
    "one name": {"targets": "down_proj"},
    "a regular expression": {"targets": r".*\.1\.(self_attn|mlp)\..*(q|up)_proj"},
    "the head and the embedding": {"targets": ["lm_head", "embed_tokens"]},
    "one layer": {"layers": [1, 1]},
    "names to pass over": {"exclude": ["k_proj", "layers.0.mlp.up_proj"]},
    "an expression to pass over": {"exclude": r".*\.0\..*", "targets": ["q_proj", "lm_head"]},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3}},
    "vectors": {"vera": True},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "saved norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "a saved block": {"targets": ["q_proj"], "modules_to_save": ["mlp"]},
}


def facts_of(model, folder, num_labels=None):
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    return read_model_facts(folder, num_labels=num_labels)


def both(model, folder, settings, *, task="chat", num_labels=None):
    """Predicted and attached: (parameters, modules) of each."""
    method = MethodSettings(rank=4, **settings)
    facts = facts_of(model, folder, num_labels)
    counted = count_trained(facts, method, is_classifier=task == "classify")
    report = apply_method(model, method, task=task, seed=0)
    attached = (report.trained_parameters, len(report.targets))
    return (counted.total, counted.num_targets), attached


@pytest.mark.parametrize("family", list(DECODERS))
def test_all_linear_adapts_what_is_predicted(family, tmp_path):
    predicted, attached = both(build(family), tmp_path, {})
    assert predicted == attached


@pytest.mark.parametrize("family", list(ENCODERS))
def test_a_classifier_trains_its_head_too(family, tmp_path):
    predicted, attached = both(build(family), tmp_path, {}, task="classify", num_labels=3)
    assert predicted == attached


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3"])
def test_targets_select_the_predicted_modules(family, setting, tmp_path):
    predicted, attached = both(build(family), tmp_path, SETTINGS[setting])
    assert predicted == attached


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt-neox", "falcon", "phi"])
def test_trained_biases_are_predicted(family, bias, tmp_path):
    predicted, attached = both(build(family), tmp_path, {"bias": bias})
    assert predicted == attached


@pytest.mark.parametrize("family", list(ENCODERS))
def test_a_classifiers_trained_biases_are_predicted(family, tmp_path):
    predicted, attached = both(
        build(family), tmp_path, {"bias": "all"}, task="classify", num_labels=3
    )
    assert predicted == attached


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("targets", [["gate_up_proj", "q_proj"], ["experts.down_proj"]])
def test_stacked_experts_are_counted_by_name(kind, targets, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 96,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    more = {"num_local_experts": 4} if kind == "mixtral" else {
        "num_experts": 4, "moe_intermediate_size": 20, "decoder_sparse_step": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more))
    predicted, attached = both(model, tmp_path, {"targets": targets})
    assert predicted == attached


def test_names_inside_a_classification_head_are_not_adapted(tmp_path):
    predicted, attached = both(
        build("roberta"), tmp_path, {"targets": ["dense"]}, task="classify", num_labels=3
    )
    assert predicted == attached


@pytest.mark.parametrize("targets", ["no_such", ["no_such"], r".*\.no\..*", "(", ["c_attn"]])
def test_targets_that_match_nothing_count_nothing(targets, tmp_path):
    model = build("llama")
    method = MethodSettings(targets=targets)
    counted = count_trained(facts_of(model, tmp_path), method, is_classifier=False)
    assert (counted.total, counted.num_targets) == (0, 0)
    with pytest.raises(RequestError):
        apply_method(model, method, task="chat", seed=0)


def test_names_to_save_that_match_nothing_are_told(tmp_path):
    method = MethodSettings(modules_to_save=["norm", "no_such"])
    counted = count_trained(facts_of(build("llama"), tmp_path), method, is_classifier=False)
    assert counted.missing_saved == ("no_such",)
