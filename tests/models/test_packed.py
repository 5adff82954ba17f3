"""Documents in one row: the same losses and gradients as one at a time, in every family."""

import numpy as np
import pytest
import torch

from lorakeet.base.records import EncodedSample, Origin
from lorakeet.data.collate import collate
from lorakeet.data.packing import build_pack, pack_rows
from lorakeet.models.packed import read_pack_facts
from lorakeet.train.step import score_batch, score_packed
from tests.families import ALL, DECODERS, ENCODERS, build

HERE = Origin(path="made", line=1)
LENGTHS = (9, 4, 13, 2, 7)
UNPACKABLE = {"falcon"}  # its attention does not go through transformers' table


def samples_of(family: str) -> list[EncodedSample]:
    rng = np.random.default_rng(3)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = rng.integers(3, 96, length).astype(np.int32)
        mask = rng.random(length) < 0.6
        mask[0], mask[-1] = False, True
        is_row = family in ENCODERS
        rows.append(EncodedSample(
            ids=ids, mask=np.zeros(length, bool) if is_row else mask, origin=HERE,
            label=number % 3 if is_row else -1,
        ))  # fmt: skip
    return rows


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(set(ALL) - UNPACKABLE))
def test_a_pack_has_the_loss_and_gradients_of_one_sample_at_a_time(family):
    model, samples = build(family), samples_of(family)
    facts = read_pack_facts(model)
    assert facts.is_packable
    assert facts.is_row_packable == (family in ENCODERS)
    alone = sum(score_batch(model, collate([sample], 0), "cpu") for sample in samples)
    expected = gradients(model, alone)
    together = score_packed(model, build_pack(samples), "cpu")
    found = gradients(model, together)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1e-8
        assert float((found[name] - gradient).abs().max()) <= 2e-5 * scale + 1e-7, name


@pytest.mark.parametrize("family", sorted(UNPACKABLE))
def test_a_family_outside_the_table_is_found_out(family):
    assert not read_pack_facts(build(family)).is_packable


def test_a_leak_between_documents_would_be_seen(monkeypatch):
    """The probe fails when the documents are not kept apart."""
    import lorakeet.models.packed as packed

    monkeypatch.setattr(packed, "_no_mask", lambda *a, **k: None)
    original = packed.attend

    def leaky(module, query, key, value, mask, **options):
        token = packed._BOUNDS.set((0, query.shape[2]))
        try:
            return original(module, query, key, value, mask, **options)
        finally:
            packed._BOUNDS.reset(token)

    packed.ALL_ATTENTION_FUNCTIONS.register(packed.NAME, leaky)
    try:
        assert not read_pack_facts(build("llama", seed=5)).is_packable
    finally:
        packed.ALL_ATTENTION_FUNCTIONS.register(packed.NAME, original)


def test_windows_hold_inside_a_pack():
    import transformers as t

    torch.manual_seed(0)
    config = t.MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        intermediate_size=48, num_key_value_heads=2, pad_token_id=0, sliding_window=4,
    )  # fmt: skip
    model, samples = t.MistralForCausalLM(config).eval(), samples_of("mistral")
    alone = sum(score_batch(model, collate([sample], 0), "cpu") for sample in samples)
    together = score_packed(model, build_pack(samples), "cpu")
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-5)


def test_no_row_is_lost_and_no_pack_is_over_full():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 400, rng.integers(1, 40)).tolist()
        packs = pack_rows(lengths, 256)
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
        for pack in packs:
            assert sum(lengths[i] for i in pack) <= 256 or len(pack) == 1


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_outside_a_pack_the_model_is_as_before(family):
    model = build(family)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(input_ids=ids)[0]
        read_pack_facts(model)
        assert torch.equal(model(input_ids=ids)[0], before)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_the_last_layer_of_an_encoder_goes_on_with_first_tokens_alone(family):
    model, samples, seen = build(family), samples_of(family), []
    read_pack_facts(model)
    widest = [m for m in model.modules() if getattr(m, "out_features", 0) == 64]
    for linear in widest:
        linear.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    score_packed(model, build_pack(samples), "cpu")
    assert seen == [(1, sum(LENGTHS)), (len(LENGTHS), 1)]
