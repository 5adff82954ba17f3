"""The answers of frozen layers, computed once a sample: the same adapter, whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as t

from lorakeet.base.events import KINDS
from lorakeet.models.frozen import find_frozen_part
from lorakeet.plan.frozen_cache import MAX_CACHE_BYTES, FrozenCase, plan_frozen_cache
from tests.train.runs import VOCABULARY, digest_of, make_job, make_recipe, run_job

CASE = FrozenCase(
    num_frozen=20, num_layers=30, num_rows=100, num_tokens=1000, token_bytes=4 * 576,
    free_bytes=10**9,
)  # fmt: skip


def upper(mode, *, layers=(2, 2), dropout=0.0, **train):
    recipe = make_recipe("lora", dropout, share_prefixes=False, cache_frozen_layers=mode, **train)
    method = recipe.method.model_copy(update={"layers": layers})
    return recipe.model_copy(update={"method": method})


def model(kind="llama", dropout=0.0):
    torch.manual_seed(5)
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(
            n_embd=16, n_layer=3, n_head=2, vocab_size=VOCABULARY, n_positions=32,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )).eval()  # fmt: skip
    return t.LlamaForCausalLM(t.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        vocab_size=VOCABULARY, attention_dropout=dropout,
    )).eval()  # fmt: skip


def trained(folder, mode="on", *, kind="llama", stop_at=None, resume=False, **options):
    job = make_job(folder, upper(mode, **options), model=model(kind), resume=resume)
    result, heard = run_job(job, stop_at=stop_at)
    return digest_of(job.model), heard, result


def codes(heard):
    return [alarm["code"] for alarm in heard.all("alarm")]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_adapter_is_the_same_with_and_without(tmp_path, kind, dropout):
    expected, plain, _ = trained(tmp_path / "off", "off", kind=kind, dropout=dropout)
    found, heard, _ = trained(tmp_path / "on", "auto", kind=kind, dropout=dropout)
    (decision,) = heard.all("frozen_cache")
    assert decision["is_on"] and decision["num_layers"] == 2 and not plain.all("frozen_cache")
    (used,) = heard.all("frozen_states")
    assert {kind for kind, _ in heard.events} <= KINDS
    assert used["num_taken"] > 0 and 0 < used["num_bytes"] <= decision["num_bytes"]
    assert found == expected
    assert not (tmp_path / "on" / "cache" / "frozen").exists()  # nothing reads it again


def test_a_resumed_run_takes_up_what_was_kept(tmp_path):
    expected, *_ = trained(tmp_path / "off", "off")
    _, _, stopped = trained(tmp_path / "on", stop_at=4)
    found, heard, result = trained(tmp_path / "on", resume=True)
    assert stopped.interrupted and found == expected and codes(heard) == []
    assert heard.all("frozen_states")[0]["num_taken"] == 8 * (result.steps - 4)


@pytest.mark.parametrize("name", ["states.bin", "index.bin"])
@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_cache_is_found_and_computed_again(tmp_path, name, harm):
    expected, *_ = trained(tmp_path / "off", "off")
    trained(tmp_path / "on", stop_at=4)
    path = tmp_path / "on" / "cache" / "frozen" / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2 : len(content) // 2 + 40] = b"\xff" * 40
    path.write_bytes(content[: -7 if harm == "cut" else None])
    found, heard, _ = trained(tmp_path / "on", resume=True)
    assert found == expected
    if (name, harm) == ("states.bin", "flip"):
        assert codes(heard) == ["frozen-cache"]


def test_a_cache_of_another_base_is_not_taken(tmp_path):
    expected, *_ = trained(tmp_path / "off", "off")
    trained(tmp_path / "gpt2", kind="gpt2", stop_at=4)
    (tmp_path / "on" / "cache").mkdir(parents=True)
    (tmp_path / "gpt2" / "cache" / "frozen").rename(tmp_path / "on" / "cache" / "frozen")
    found, heard, _ = trained(tmp_path / "on")
    assert found == expected and codes(heard) == ["frozen-cache"]


def test_what_cannot_be_kept_is_told_when_it_was_asked_for(tmp_path):
    _, heard, _ = trained(tmp_path / "low", layers=(0, 1))
    assert codes(heard) == ["no-frozen-cache"] and not heard.all("frozen_cache")[0]["is_on"]
    assert not (tmp_path / "low" / "cache" / "frozen").exists()
    _, heard, _ = trained(tmp_path / "once", "auto", epochs=1)
    assert codes(heard) == [] and "second time" in heard.all("frozen_cache")[0]["reason"]


def test_dropout_below_the_adapters_turns_it_off(tmp_path):
    for kind in ("llama", "gpt2"):
        job = make_job(tmp_path / kind, upper("on"), model=model(kind, dropout=0.1))
        assert "dropout" in find_frozen_part(job.model)


def test_the_plan_says_why_not_or_what_it_costs():
    recipe = upper("auto", epochs=3, batch_size=10)
    plan = plan_frozen_cache(recipe, CASE)
    assert plan.is_on and plan.num_bytes == 1000 * 4 * 576
    assert plan.speed_up == pytest.approx((40 + 40) / (40 / 3 + 40))
    for change, word in (
        ({"free_bytes": 10**6}, "room"), ({"num_frozen": 0}, "below"),
        ({"num_tokens": MAX_CACHE_BYTES}, "room"), ({"saved_fraction": 0.5}, "sharing"),
        ({"num_frozen": 1}, "1.0"),
    ):  # fmt: skip
        found = plan_frozen_cache(recipe, replace(CASE, **change))
        assert not found.is_on and word in found.reason
    assert plan_frozen_cache(upper("on", epochs=3), replace(CASE, saved_fraction=0.5)).is_on
    assert not plan_frozen_cache(upper("off"), CASE).is_on
