"""Predicted bytes, part by part, against sums done by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as t

from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.records import EncodedSample, Origin
from lorakeet.data.packing import build_pack
from lorakeet.models.fast import fast_units
from lorakeet.models.methods import apply_method
from lorakeet.plan.memory import (
    ALLOCATOR_FRACTION,
    AT_WORK_F,
    CHUNK_LOGITS,
    KINDS,
    PAGE_BYTES,
    PLAIN_FRACTION,
    MemoryCase,
    count_kept,
    estimate_memory,
)
from lorakeet.plan.model_facts import read_model_facts
from lorakeet.plan.sizes import build_shape
from lorakeet.plan.trained import count_trained
from lorakeet.train.step import score_packed
from tests.plan.configs import write_config

HIDDEN, FFN, LAYERS, VOCABULARY, TOKENS = 64, 128, 2, 1000, 100
LINEAR = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
OTHER = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
LARGEST = HIDDEN * FFN
OUTPUTS = 5 * HIDDEN + 2 * FFN  # of one layer's seven modules
TRAINED = 16 * LAYERS * (5 * HIDDEN + 2 * FFN + 6 * HIDDEN + FFN)
PARAMETERS = LINEAR + OTHER
WASTE = 1 + ALLOCATOR_FRACTION[False]


@pytest.fixture
def facts(tmp_path):
    write_config(tmp_path, {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    })  # fmt: skip
    return read_model_facts(tmp_path)


def counted_of(facts, **settings):
    return count_trained(facts, MethodSettings(**settings), is_classifier=False)


def estimate(facts, kind, *, is_gpu=False, tokens=TOKENS, **case):
    return estimate_memory(facts, kind, MemoryCase(
        counted=counted_of(facts), micro_batch_tokens=tokens, is_gpu=is_gpu, **case
    ))  # fmt: skip


def test_a_mix_takes_the_bits_of_its_budget(facts):
    five, six = (
        estimate(facts, "qlora", quantization=QuantizationSettings(kind="mixed", bits_per_weight=b))
        for b in (5, 6)
    )
    assert six.weights - five.weights == LINEAR // 8


@pytest.mark.parametrize(("is_gpu", "w"), [(False, 4), (True, 2)])
def test_weights_are_counted_in_the_bytes_of_their_kind(facts, is_gpu, w):
    found = {kind: estimate(facts, kind, is_gpu=is_gpu).weights for kind in KINDS}
    assert found == {
        "full": 4 * (LINEAR + OTHER),  # 16-bit weights lose small steps
        "lora": w * (LINEAR + OTHER),
        "lora-8bit": LINEAR + 4 * LAYERS * OUTPUTS + w * (OTHER + LARGEST),
        "qlora": int((0.5 + 1 / 64 + 4 / 256 / 64) * LINEAR) + w * (OTHER + LARGEST),
    }


def test_lora_keeps_16_bytes_a_trained_parameter_and_full_has_no_adapter(facts):
    lora, full = estimate(facts, "lora"), estimate(facts, "full")
    assert lora.adapter + lora.gradients + lora.optimizer == 16 * TRAINED
    assert (full.adapter, full.gradients, full.optimizer) == (0, 4 * PARAMETERS, 8 * PARAMETERS)


def test_the_best_weights_and_the_state_that_is_written_are_copied_in_main_memory(facts):
    assert estimate(facts, "lora").copies == (4 + 12) * TRAINED
    assert estimate(facts, "full").copies == (4 + 12) * PARAMETERS
    assert estimate(facts, "full", keeps_best=False).copies == 12 * PARAMETERS
    assert estimate(facts, "full", is_gpu=True).copies == 0


def test_layers_in_few_bits_bring_a_compiler_into_the_process(facts):
    found = {kind: estimate(facts, kind).process for kind in KINDS}
    assert found["qlora"] == found["lora-8bit"] > found["lora"] == found["full"]


def test_moments_in_8_bits_take_a_quarter_and_adalora_keeps_its_scores(facts):
    assert estimate(facts, "full", optimizer="adamw-8bit").optimizer == int(2.03 * PARAMETERS)
    assert estimate(facts, "full", optimizer="adamw-8bit-paged").optimizer == int(2.03 * PARAMETERS)
    assert estimate(facts, "lora", form="adalora").optimizer == 16 * TRAINED
    assert estimate(facts, "full", form="adalora").optimizer == 8 * PARAMETERS


def test_paged_moments_take_one_piece_of_a_gpu():
    facts = build_shape("7B")
    assert estimate(facts, "full", is_gpu=True, optimizer="adamw-paged").optimizer == PAGE_BYTES
    assert estimate(facts, "full", optimizer="adamw-paged").optimizer == 8 * facts.parameters


def test_layers_that_are_computed_again_keep_their_inputs_and_one_layer(facts):
    def kept(recompute, is_gpu=False):
        one, two = (estimate(facts, "lora", is_gpu=is_gpu, tokens=tokens, recompute=recompute)
                    .activations for tokens in (1000, 2000))  # fmt: skip
        return (two - one) / 1000

    layer = 6 * HIDDEN + 2 * FFN + 16 * 7
    at_work = max(AT_WORK_F * FFN + 2 * HIDDEN, 2 * VOCABULARY + 3 * HIDDEN) * 4
    assert kept("on") == pytest.approx(WASTE * (layer + LAYERS * HIDDEN) * 4 + at_work, abs=1)
    assert kept("offload") == kept("on") < kept("off") == kept("auto")
    inputs = kept("on", is_gpu=True) - kept("offload", is_gpu=True)
    assert inputs == pytest.approx(1.05 * LAYERS * HIDDEN * 2, abs=1)


def test_activations_are_what_layers_keep_and_the_logits_stop_at_a_chunk(facts):
    kept = (2 * HIDDEN + 4 * HIDDEN + 2 * FFN) * LAYERS + 16 * 7 * LAYERS

    def expected(tokens, logits_bytes):
        a_token = (WASTE * kept + 3 * HIDDEN) * 4
        return pytest.approx(a_token * tokens + logits_bytes, abs=1)

    assert estimate(facts, "lora").activations == expected(TOKENS, 8 * TOKENS * VOCABULARY)
    many = CHUNK_LOGITS // VOCABULARY * 2
    assert estimate(facts, "lora", tokens=many).activations == expected(many, 12 * CHUNK_LOGITS)
    at_work = (AT_WORK_F * FFN + 2 * HIDDEN) * 4
    most = CHUNK_LOGITS // VOCABULARY * 1000
    found = estimate(facts, "lora", tokens=most).activations
    assert found == pytest.approx((WASTE * kept * 4 + at_work) * most, abs=1)


def test_dora_keeps_two_outputs_of_each_module_and_full_the_gradients_of_both_tables(facts):
    lora, adalora, dora, full = (
        estimate(facts, kind, form=form).activations
        for kind, form in (("lora", "lora"), ("lora", "adalora"), ("lora", "dora"),
                           ("full", "lora"))
    )  # fmt: skip
    outputs, ranks = OUTPUTS, 16 * 7
    share = WASTE * TOKENS * 4 * LAYERS
    hole = outputs * TOKENS * 4 * LAYERS
    more = FFN + 2 * HIDDEN  # the product of the feed-forward part and the norms' answers
    assert dora - lora == pytest.approx((2 * outputs + more) * share + 2 * hole, abs=1)
    assert adalora - lora == pytest.approx((ranks + more) * share + hole, abs=1)
    kept = (4 * HIDDEN + 2 * (HIDDEN + HIDDEN) + 3 * FFN) * TOKENS * 4 * LAYERS
    tables = 2 * 4 * VOCABULARY * HIDDEN + (PLAIN_FRACTION - ALLOCATOR_FRACTION[False]) * kept
    assert full - lora == pytest.approx(tables + (more - ranks) * share, abs=1)


LORA, FULL, STACKS = {"rank": 16}, {"kind": "full"}, ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize(("family", "method"), [
    ("llama", LORA), ("llama", {"rank": 16, "dora": True}),
    ("llama", {"rank": 12, "adalora": {"target_rank": 8}}), ("llama", FULL),
    ("mixtral", LORA), ("mixtral", FULL), ("mixtral", {"targets": ["q_proj", *STACKS]}),
    ("qwen2_moe", LORA), ("qwen2_moe", FULL), ("qwen3_moe", LORA), ("qwen3", LORA),
])  # fmt: skip
def test_what_a_layer_keeps_is_what_autograd_saves(tmp_path, family, method):
    """The difference of one layer and of 64 tokens more, counted by autograd's own hook."""
    saved = {(layers, tokens): count_saved(family, layers, tokens, method)
             for layers in (1, 2) for tokens in (64, 128)}  # fmt: skip
    found = (saved[2, 128] - saved[1, 128]) - (saved[2, 64] - saved[1, 64])
    predicted = {}
    for layers in (1, 2):
        write_config(tmp_path, {**shape_of(family, layers), "model_type": family})
        facts = read_model_facts(tmp_path)
        form = next((key for key in ("dora", "adalora") if key in method), "lora")
        for tokens in (64, 128):
            case = MemoryCase(counted=counted_of(facts, **method), micro_batch_tokens=tokens,
                              is_gpu=False, form=form)  # fmt: skip
            kind = method.get("kind", "lora")
            predicted[layers, tokens] = tokens * count_kept(facts, kind, case)
    expected = (predicted[2, 128] - predicted[1, 128]) - (predicted[2, 64] - predicted[1, 64])
    assert found == pytest.approx(4 * expected, rel=0.01)


def test_adapted_experts_are_held_a_second_time(tmp_path):
    write_config(tmp_path, {**shape_of("mixtral", 2), "model_type": "mixtral"})
    facts = read_model_facts(tmp_path)
    down, up = (num * 4 * 96 * 256 for num in (1, 2))  # of one layer, with four experts
    for recompute, layers in (("off", 2), ("on", 1)):
        alone, with_stacks = (
            estimate_memory(facts, "lora", MemoryCase(
                counted=counted_of(facts, targets=targets), micro_batch_tokens=1, is_gpu=False,
                recompute=recompute,
            )).activations
            for targets in (["q_proj"], ["q_proj", *STACKS])
        )  # fmt: skip
        assert with_stacks - alone == pytest.approx(4 * (layers * (down + up) + 2 * up), rel=0.01)


SHAPE = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6,
         "num_key_value_heads": 2, "vocab_size": 512, "pad_token_id": 0}  # fmt: skip
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 72,
                  "shared_expert_intermediate_size": 136},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 72,
                  "head_dim": 16},
}  # fmt: skip


def shape_of(family, layers):
    return {**SHAPE, **EXPERTS.get(family, {}), "num_hidden_layers": layers}


def count_saved(family, layers, tokens, method):
    """Bytes that a packed forward pass keeps for its backward pass, weights not counted."""
    torch.manual_seed(0)
    config = t.AutoConfig.for_model(family, **shape_of(family, layers))
    model = t.AutoModelForCausalLM.from_config(config)
    settings = recipe_from_dict({"base": "x", "data": {"train": "a"}, "method": method}).method
    apply_method(model, settings, task="text", seed=0)
    draw, origin = np.random.default_rng(0), Origin(path="a", line=1)
    rows = [EncodedSample(ids=draw.integers(3, 512, tokens // 2), mask=np.arange(tokens // 2) > 0,
                          origin=origin) for _ in "ab"]  # fmt: skip
    own = {parameter.data_ptr() for parameter in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with fast_units(model):
        model.train()
        pack, device = build_pack(rows), torch.device("cpu")
        score_packed(model, pack, device)  # probes of the model are made once
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = score_packed(model, pack, device)
    loss.backward()
    return sum(saved.values())


def test_the_total_is_the_sum_of_the_parts(facts):
    parts = estimate(facts, "qlora").to_dict()
    assert parts.pop("total") == sum(parts.values())


def test_a_frozen_base_from_16_bits_is_held_in_16_bits_on_a_cpu(facts):
    narrow = replace(facts, stored_bytes=2)
    tables = 2 * VOCABULARY * HIDDEN
    held = 2 * (LINEAR + tables) + 4 * (OTHER - tables + LARGEST)
    assert estimate(narrow, "lora", tokens=10_000).weights == held
    assert estimate(narrow, "full") == estimate(facts, "full")
    assert estimate(narrow, "lora", is_gpu=True) == estimate(facts, "lora", is_gpu=True)
    loading = {"lora": 2 * (LINEAR + tables) + 4 * OTHER, "dora": 6 * (LINEAR + OTHER)}
    for form, expected in loading.items():
        case = MemoryCase(counted=counted_of(facts, rank=1), micro_batch_tokens=1, is_gpu=False,
                          form=form)  # fmt: skip
        few = estimate_memory(narrow, "lora", case)
        later = few.total - few.process - few.adapter - few.weights
        assert few.weights == max(held, expected - later)


@pytest.mark.parametrize(
    ("kind", "dtype", "stored"),
    [("llama", "bfloat16", 2), ("llama", "float16", 2), ("llama", "float32", 4),
     ("llama", ["odd"], 4), ("gpt2", "bfloat16", 4)],
)  # fmt: skip
def test_the_configuration_says_how_wide_weights_are_stored(tmp_path, kind, dtype, stored):
    write_config(tmp_path, {"model_type": kind, "torch_dtype": dtype})
    assert read_model_facts(tmp_path).stored_bytes == stored
