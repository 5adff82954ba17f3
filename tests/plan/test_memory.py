"""Predicted bytes, part by part, against sums done by hand."""

import pytest

from lorakeet.plan.memory import CHUNK_LOGITS, KINDS, estimate_memory
from lorakeet.plan.model_facts import read_model_facts
from tests.plan.configs import write_config

HIDDEN, FFN, LAYERS, VOCABULARY, TOKENS = 64, 128, 2, 1000, 100
LINEAR = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
OTHER = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
TRAINED = 500


@pytest.fixture
def facts(tmp_path):
    write_config(tmp_path, {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    })  # fmt: skip
    return read_model_facts(tmp_path)


def estimate(facts, kind, *, is_gpu=False, tokens=TOKENS):
    return estimate_memory(
        facts, kind, trained_parameters=TRAINED, micro_batch_tokens=tokens, is_gpu=is_gpu
    )


@pytest.mark.parametrize(("is_gpu", "w"), [(False, 4), (True, 2)])
def test_weights_are_counted_in_the_bytes_of_their_kind(facts, is_gpu, w):
    found = {kind: estimate(facts, kind, is_gpu=is_gpu).weights for kind in KINDS}
    assert found == {
        "full": w * (LINEAR + OTHER),
        "lora": w * (LINEAR + OTHER),
        "lora-8bit": LINEAR + w * OTHER,
        "qlora": int(0.516 * LINEAR + w * OTHER),
    }


def test_lora_keeps_16_bytes_a_trained_parameter_and_full_has_no_adapter(facts):
    lora, full = estimate(facts, "lora"), estimate(facts, "full")
    assert lora.adapter + lora.gradients + lora.optimizer == 16 * TRAINED
    assert (full.adapter, full.gradients, full.optimizer) == (0, 4 * TRAINED, 8 * TRAINED)


def test_activations_grow_with_tokens_and_layers_and_the_logits_stop_at_a_chunk(facts):
    logits = 8 * TOKENS * VOCABULARY
    kept = TOKENS * (16 * HIDDEN + 4 * FFN) * LAYERS * 4
    assert estimate(facts, "lora").activations == kept + logits
    many = CHUNK_LOGITS // VOCABULARY * 10
    assert estimate(facts, "lora", tokens=many).activations == (
        many // TOKENS * kept + 8 * CHUNK_LOGITS
    )


def test_the_total_is_the_sum_of_the_parts(facts):
    parts = estimate(facts, "qlora").to_dict()
    assert parts.pop("total") == sum(parts.values())
