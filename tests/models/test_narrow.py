"""A frozen base in 16 bits trains as the wide one does, bit for bit."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorakeet.adapters.attach import attach
from lorakeet.adapters.settings import Lora
from lorakeet.models.fast import fast_units
from lorakeet.models.head import count_ids
from lorakeet.models.narrow import narrow_frozen
from lorakeet.models.score import score_targets
from lorakeet.quant.narrow import NarrowLinear, to_narrow

FORMS = {
    "lora": Lora(rank=4),
    "upper layers": Lora(rank=4, layers=(1,)),
    "dora": Lora(rank=4, dora=True),
    "dropout": Lora(rank=4, dropout=0.3),
    "some": Lora(rank=4, targets=("q_proj",), bias="all", modules_to_save=("down_proj",)),
}


def build(dtype: torch.dtype = torch.bfloat16, *, is_tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, attention_bias=True, tie_word_embeddings=is_tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).float().eval()


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(24).view(2, 12) % 90
    whole = torch.ones_like(ids, dtype=torch.bool)
    torch.manual_seed(1)
    with fast_units(model) as units:
        assert units["gate"] == 2
        loss, _ = score_targets(model.train(), ids, whole, whole)
        loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_those_of_the_wide_base(form: str, is_tied: bool) -> None:
    wide = build(is_tied=is_tied)
    attach(wide, FORMS[form], seed=3)
    for name, parameter in wide.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(4)).mul_(0.05)
    narrow = copy.deepcopy(wide)
    assert narrow_frozen(narrow) >= 11
    assert (narrow.model.embed_tokens.codes is narrow.lm_head.codes) == is_tied
    expected, found = step(wide), step(narrow)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_narrow_base_holds_half_the_bytes_and_one_scratch() -> None:
    model = build()
    wide = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    attach(model, Lora(rank=4))
    narrow_frozen(model)
    assert wide() is None
    layers = [m for m in model.modules() if type(m) is NarrowLinear]
    step(model)
    assert len(layers) == 14
    assert all(layer.codes.dtype == torch.bfloat16 for layer in layers)
    assert {id(layer.scratch) for layer in layers} == {id(layers[0].scratch)}
    assert [each.numel() for each in layers[0].scratch.held.values()] == [64 * 32]


def test_what_needs_more_bits_trains_or_is_read_whole_stays_wide() -> None:
    model = build()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 0.1
    attach(model, Lora(rank=4, modules_to_save=("gate_proj",), targets=("q_proj", "up_proj")))
    narrow_frozen(model)
    layers = model.model.layers
    assert type(layers[0].mlp.up_proj.base_layer) is nn.Linear
    assert type(layers[1].mlp.up_proj.base_layer) is NarrowLinear
    assert type(layers[0].mlp.gate_proj.modules_to_save["default"]) is nn.Linear
    assert type(layers[0].self_attn.q_proj.lora_B["default"]) is nn.Linear


def test_ends_that_train_are_bent_or_tied_to_what_trains_stay_wide() -> None:
    for is_tied in (True, False):
        model = build(is_tied=is_tied)
        attach(model, Lora(rank=4, modules_to_save=("lm_head",), targets=("q_proj",)))
        narrow_frozen(model)
        assert type(model.lm_head.modules_to_save["default"]) is nn.Linear
    model = build(is_tied=True)
    model.config.final_logit_softcapping = 30.0
    attach(model, Lora(rank=4))
    narrow_frozen(model)
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding


@torch.no_grad()
def test_a_narrow_head_answers_as_the_wide_one_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = build(is_tied=True)
    attach(wide, Lora(rank=4))
    narrow = copy.deepcopy(wide)
    narrow_frozen(narrow)
    monkeypatch.setattr("lorakeet.quant.narrow.BLOCK_ROWS", 40)
    monkeypatch.setattr("lorakeet.models.frozen_head.FEWEST_IDS", 40)
    monkeypatch.setattr("lorakeet.models.frozen_head.BLOCK_LOGITS", 1)
    ids = torch.arange(24).view(2, 12) % 90
    torch.testing.assert_close(narrow(ids).logits, wide(ids).logits)
    whole = torch.ones_like(ids, dtype=torch.bool)
    found, expected = (score_targets(model, ids, whole, whole)[0] for model in (narrow, wide))
    torch.testing.assert_close(found, expected)
    assert count_ids(narrow) == 96 and torch.equal(
        narrow.model.embed_tokens.weight, wide.lm_head.weight
    )


def test_full_training_and_a_transposed_family_stay_as_they_are() -> None:
    assert narrow_frozen(build()) == 0
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96)
    model = GPT2LMHeadModel(config).eval()
    attach(model, Lora(rank=4))
    assert narrow_frozen(model) == 0


def test_half_precision_checkpoints_are_found_too() -> None:
    weight = torch.tensor([1 + 2**-10, 0.5])
    assert to_narrow(weight).dtype == torch.float16
    assert to_narrow(torch.tensor([1 + 2**-20])) is None
