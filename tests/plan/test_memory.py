"""Predicted bytes, part by part, against sums done by hand."""

import pytest

from lorakeet.plan.memory import (
    ALLOCATOR_FRACTION,
    AT_WORK_F,
    CHUNK_LOGITS,
    KINDS,
    MemoryCase,
    estimate_memory,
)
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


def estimate(facts, kind, *, is_gpu=False, tokens=TOKENS, **case):
    return estimate_memory(facts, kind, MemoryCase(
        trained_parameters=TRAINED, micro_batch_tokens=tokens, is_gpu=is_gpu, **case
    ))  # fmt: skip


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


def test_the_best_weights_and_the_state_of_a_checkpoint_are_copied_in_main_memory(facts):
    assert estimate(facts, "lora").copies == (4 + 4 + 8) * TRAINED
    assert estimate(facts, "full", keeps_best=False).copies == (4 + 8) * TRAINED
    assert estimate(facts, "full", is_gpu=True).copies == 0


def test_moments_in_8_bits_take_a_quarter_and_adalora_keeps_its_scores(facts):
    assert estimate(facts, "full", optimizer="adamw-8bit").optimizer == int(2.03 * TRAINED)
    assert estimate(facts, "lora", form="adalora").optimizer == 16 * TRAINED
    assert estimate(facts, "full", form="adalora").optimizer == 8 * TRAINED


def test_activations_are_what_layers_keep_and_the_logits_stop_at_a_chunk(facts):
    kept = (4 * HIDDEN + 5 * HIDDEN + 3 * FFN) * LAYERS + 16 * 7 * LAYERS
    at_work = AT_WORK_F * FFN + 2 * HIDDEN
    a_token = (1 + ALLOCATOR_FRACTION) * (kept + at_work) * 4

    def expected(tokens, logits):
        return pytest.approx(a_token * tokens + tokens * 3 * HIDDEN * 4 + 8 * logits, abs=1)

    assert estimate(facts, "lora").activations == expected(TOKENS, TOKENS * VOCABULARY)
    many = CHUNK_LOGITS // VOCABULARY * 10
    assert estimate(facts, "lora", tokens=many).activations == expected(many, CHUNK_LOGITS)


def test_dora_keeps_two_outputs_of_each_module_and_full_the_gradients_of_both_tables(facts):
    lora, dora, full = (
        estimate(facts, kind, form=form).activations
        for kind, form in (("lora", "lora"), ("lora", "dora"), ("full", "lora"))
    )
    outputs = 5 * HIDDEN + 2 * FFN
    share = (1 + ALLOCATOR_FRACTION) * TOKENS * 4 * LAYERS
    assert dora - lora == pytest.approx(2 * outputs * share, abs=1)
    assert full - lora == pytest.approx(2 * 4 * VOCABULARY * HIDDEN - 16 * 7 * share, abs=1)


def test_the_total_is_the_sum_of_the_parts(facts):
    parts = estimate(facts, "qlora").to_dict()
    assert parts.pop("total") == sum(parts.values())
