"""Openings that stand once: the loss and gradients of one sample at a time, in every family."""

import numpy as np
import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.adapters.attach import attach
from lorakeet.adapters.settings import Lora
from lorakeet.base.records import EncodedSample, Origin
from lorakeet.data.collate import collate
from lorakeet.data.packing import build_pack
from lorakeet.data.prefixes import find_prefixes, pack_shared_rows
from lorakeet.models import attention
from lorakeet.models.attention import How, Layout, attend_segments
from lorakeet.models.packed import read_pack_facts
from lorakeet.train.step import has_dropout, score_batch, score_packed
from tests.families import DECODERS, ENCODERS, build

HERE = Origin(path="made", line=1)
SYSTEM, DOCUMENT = 17, 16  # tokens of a prompt that all share, and of a document that some do
UNPACKABLE = {"falcon"}


def some_samples() -> list[EncodedSample]:
    """A system prompt, below it a document with two questions; a stranger; a repeated row.

    Trained tokens stand inside the openings, right behind them, and at the ends.
    """
    rng = np.random.default_rng(3)
    draw = lambda size: rng.integers(3, 96, size)  # noqa: E731
    system, document = draw(SYSTEM), draw(DOCUMENT)
    rows = [
        np.concatenate([system, document, draw(5)]), draw(7), np.concatenate([system, draw(6)]),
        np.concatenate([system, document, draw(3)]), np.concatenate([system, draw(1)]),
    ]  # fmt: skip
    rows += [rows[2].copy(), np.concatenate([system, document])]
    samples = []
    for ids in rows:
        mask = rng.random(len(ids)) < 0.4
        mask[0], mask[-1] = False, True
        mask[SYSTEM : SYSTEM + 1] = True
        samples.append(EncodedSample(ids=ids.astype(np.int32), mask=mask, origin=HERE))
    return samples


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def shared_pack(samples):
    return build_pack(samples, find_prefixes([sample.ids for sample in samples]))


def check_shared_equals_alone(model, samples):
    pack = shared_pack(samples)
    assert pack.num_targets == sum(int(s.mask.sum()) for s in samples)
    assert len(pack.ids_T) < sum(len(s.ids) for s in samples)
    alone = sum(score_batch(model, collate([sample], 0), "cpu") for sample in samples)
    expected = gradients(model, alone)
    together = score_packed(model, pack, "cpu")
    found = gradients(model, together)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        far = float((found[name] - gradient).norm() / gradient.norm().clamp_min(1e-8))
        assert far <= 2e-6, (name, far)


@pytest.mark.parametrize("family", sorted(set(DECODERS) - UNPACKABLE))
def test_shared_openings_have_the_loss_and_gradients_of_one_sample_at_a_time(family):
    model = build(family)
    assert read_pack_facts(model).is_shareable
    attach(model, Lora(rank=4, alpha=8, targets="all-linear"))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    check_shared_equals_alone(model, some_samples())


@pytest.mark.parametrize("how", [How(is_causal=True), How(is_causal=True, scaling=0.3),
                                 How(is_causal=True, window=60)])  # fmt: skip
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_fast_attention_is_the_readable_one(how, key_heads, monkeypatch):
    layout = Layout.build((0, 17, 20, 36, 40, 41, 50), (-1, 0, 0, 2, 2, -1))
    assert layout.openings == (((0, 17), (17, 41)), ((20, 36), (36, 41)))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 50, heads, 8, generator=generator).transpose(1, 2).requires_grad_()
        for heads in (4, key_heads, key_heads)
    )
    weights = torch.randn(1, 4, 50, 8, generator=generator)
    found = []
    for _ in range(2):
        out = attend_segments(q, k, v, layout, how)
        found.append([out, *torch.autograd.grad((out * weights).sum(), [q, k, v])])
        monkeypatch.setattr(attention, "_is_fast", lambda *_: False)
    assert "JoinedAttention" in str(found[0][0].grad_fn)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [4, 20])
def test_windows_hold_across_an_opening(window):
    torch.manual_seed(0)
    config = t.MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        intermediate_size=48, num_key_value_heads=2, pad_token_id=0, sliding_window=window,
    )  # fmt: skip
    check_shared_equals_alone(t.MistralForCausalLM(config).eval(), some_samples())


def test_rows_that_are_equal_from_end_to_end_count_each():
    """Nothing follows their opening, so the pack has no segment with a parent."""
    model, sample = build("llama"), some_samples()[2]
    pack = shared_pack([sample, sample, sample])
    assert not pack.parents and pack.counts_T.max() == 3
    check_shared_equals_alone(model, [sample, sample, sample])


@pytest.mark.parametrize("family", sorted(ENCODERS) + sorted(UNPACKABLE))
def test_models_that_see_both_ways_or_cannot_be_packed_do_not_share(family):
    assert not read_pack_facts(build(family)).is_shareable


def test_dropout_is_seen_wherever_it_stands():
    assert not has_dropout(build("llama"))
    assert has_dropout(build("gpt2"))  # its config's own default
    attentive = t.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=96,
        intermediate_size=48, attention_dropout=0.1,
    )  # fmt: skip
    assert has_dropout(t.LlamaForCausalLM(attentive))
    model = build("llama")
    attach(model, Lora(rank=4, alpha=8, dropout=0.1, targets="all-linear"))
    assert has_dropout(model)


def test_an_opening_of_a_few_tokens_stands_in_each_sample():
    rows = [np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5, 6])]
    assert find_prefixes(rows).num_saved_tokens == 0


@st.composite
def families_of_rows(draw):
    """Rows that fork from one another at any place."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [rng.integers(0, 3, draw(st.integers(1, 60)))]
    for _ in range(draw(st.integers(0, 12))):
        parent = rows[draw(st.integers(0, len(rows) - 1))]
        keep = draw(st.integers(0, len(parent)))
        own = rng.integers(0, 3, draw(st.integers(0, 40)))
        rows.append(np.concatenate([parent[:keep], own]) if keep + len(own) else parent)
    return rows


@settings(max_examples=300, deadline=None)
@given(rows=families_of_rows(), max_tokens=st.integers(20, 200))
def test_no_sample_is_lost_or_doubled_and_no_pack_is_over_full(rows, max_tokens):
    rng = np.random.default_rng(len(rows))
    samples = []
    for row in rows:
        mask = rng.random(len(row)) < 0.5
        mask[0] = False
        samples.append(EncodedSample(ids=row.astype(np.int32), mask=mask, origin=HERE))
    prefixes = find_prefixes(rows)
    lengths = [len(row) for row in rows]
    groups = pack_shared_rows(lengths, prefixes, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for group in groups:
        chosen, among = [samples[i] for i in group], prefixes.among(group)
        if not any(sample.mask.any() for sample in chosen):
            continue
        pack = build_pack(chosen, among)
        assert len(pack.ids_T) == sum(lengths[i] for i in group) - among.num_saved_tokens
        assert len(pack.ids_T) <= max_tokens or len(group) == 1
        whole, leaves = read_back(pack)
        rows_of_pack = [sample.ids.tolist() for sample in chosen]
        assert all(row in whole for row in rows_of_pack)
        assert all(leaf in rows_of_pack for leaf in leaves)
        assert pack.num_targets == sum(int(s.mask.sum()) for s in chosen)


def read_back(pack) -> tuple[list[list[int]], list[list[int]]]:
    """What each segment ends, from its head on; and the same for those that nothing follows."""
    spans = list(zip(pack.bounds, pack.bounds[1:], strict=False))
    parents = pack.parents or (-1,) * len(spans)
    whole: list[list[int]] = []
    for (start, end), parent in zip(spans, parents, strict=True):
        before = whole[parent] if parent >= 0 else []
        places = range(len(before), len(before) + end - start)
        assert pack.positions_T[start:end].tolist() == list(places)
        whole.append(before + pack.ids_T[start:end].tolist())
    return whole, [row for number, row in enumerate(whole) if number not in parents]
