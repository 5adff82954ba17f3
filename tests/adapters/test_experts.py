"""Adapters of experts that are stacked in one parameter, against a loop over single experts."""

import json

import pytest
import torch
import transformers as t
from torch.nn import functional as F

from lorakeet.adapters.attach import adapter_parameters, attach, detach, no_adapter, set_active
from lorakeet.adapters.experts import wrapper_of
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.merge import merge, unmerge
from lorakeet.api.adapters import select_targets_of
from lorakeet.base.errors import RequestError
from tests.families import some_ids

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
          "num_key_value_heads": 2, "pad_token_id": 0, "num_experts_per_tok": 2}  # fmt: skip
BUILDS = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(
        **_SMALL, intermediate_size=24, num_local_experts=4)),
    "qwen2-moe": lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(
        **_SMALL, intermediate_size=24, moe_intermediate_size=20, num_experts=4,
        shared_expert_intermediate_size=16)),
    "qwen3-moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(
        **_SMALL, intermediate_size=24, moe_intermediate_size=20, num_experts=4, head_dim=8)),
}  # fmt: skip
families = pytest.mark.parametrize("family", BUILDS)
BOTH = ("experts.gate_up_proj", "experts.down_proj")


def build(family):
    torch.manual_seed(0)
    return BUILDS[family]().eval()


def answer(model):
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


def move(model, name="default", seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def build_moved(family, targets=(*BOTH, "q_proj"), name="default"):
    model = build(family)
    attach(model, Lora(rank=3, alpha=6, targets=targets), name=name)
    move(model, name)
    return model


@families
def test_step_0_is_the_base_and_detaching_restores_the_very_objects(family):
    model = build(family)
    before, modules = answer(model), dict(model.named_modules())
    report = attach(model, Lora(rank=3, targets=(*BOTH, "q_proj")))
    assert torch.equal(answer(model), before)
    assert sum("experts" in name for name in report.targets) == 4
    move(model)
    assert not torch.allclose(answer(model), before)
    with no_adapter(model):
        assert torch.equal(answer(model), before)
    detach(model)
    assert dict(model.named_modules()) == modules and torch.equal(answer(model), before)


def loop(experts, x_TI, chosen, shares, factors):
    """The feed-forward of each token's experts, one token and one expert at a time."""
    rows = []
    for x, experts_of_x, shares_of_x in zip(x_TI, chosen, shares, strict=True):
        row = torch.zeros_like(x)
        for e, share in zip(experts_of_x.tolist(), shares_of_x, strict=True):
            (A1, B1), (A2, B2) = factors
            both = experts.gate_up_proj[e] @ x + 2.0 * (B1[e] @ (A1[e] @ x))
            gate, up = both.chunk(2)
            inner = F.silu(gate) * up
            row = row + share * (experts.down_proj[e] @ inner + 2.0 * (B2[e] @ (A2[e] @ inner)))
        rows.append(row)
    return torch.stack(rows)


@families
def test_answers_and_gradients_are_those_of_a_loop_over_experts(family):
    model = build_moved(family, BOTH)
    path = "model.layers.1.mlp.experts"
    wrapped = model.get_submodule(path)
    layers = [wrapper_of(model, f"{path}.{name}") for name in ("gate_up_proj", "down_proj")]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    chosen = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 3]])
    shares = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))
    found = wrapped(x, chosen, shares)
    factors = [layer.factors("default") for layer in layers]
    expected = loop(layers[0].owner, x, chosen, shares, factors)
    assert torch.allclose(found, expected, atol=1e-6)
    trained = [p for n, p in adapter_parameters(model).items() if path in n]
    assert len(trained) == 4
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), [x, *trained]),
        torch.autograd.grad(expected.square().sum(), [x, *trained]), strict=True,
    ):  # fmt: skip
        assert torch.allclose(one, other, atol=1e-5 * float(other.abs().max().clamp(min=1)))


@families
def test_merging_keeps_the_answers_and_unmerging_every_bit(family):
    model = build_moved(family)
    apart = answer(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    merge(model)
    assert torch.allclose(answer(model), apart, atol=2e-5)
    unmerge(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    merge(model)
    detach(model)
    assert torch.allclose(answer(model), apart, atol=2e-5)


@families
@pytest.mark.parametrize("targets", [(*BOTH, "q_proj"), BOTH, BOTH[:1], BOTH[1:]])
def test_files_go_both_ways_with_peft(family, targets, tmp_path):
    ours = build_moved(family, targets)
    write_adapter(ours, tmp_path / "ours", base="none")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert all("experts" in name for name in config["target_parameters"])
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    assert torch.allclose(answer(theirs), answer(ours), atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = build(family)
    read_adapter(back, tmp_path / "theirs")
    assert torch.allclose(answer(back), answer(ours), atol=1e-6)


def test_adapters_of_different_parameters_switch_and_are_written_alone(tmp_path):
    model = build_moved("mixtral", BOTH, "one")
    answers = {"one": answer(model)}
    attach(model, Lora(rank=2, targets=BOTH[:1]), name="two")
    move(model, "two", 6)
    answers["two"] = answer(model)
    for name in ("one", "two"):
        set_active(model, name)
        assert torch.equal(answer(model), answers[name])
        write_adapter(model, tmp_path / name, name=name, base="none")
        other = build("mixtral")
        read_adapter(other, tmp_path / name)
        assert torch.allclose(answer(other), answers[name], atol=1e-6)
    detach(model, "one")
    set_active(model, "two")
    assert torch.equal(answer(model), answers["two"])


def test_the_shown_targets_count_every_expert(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    report = attach(model, Lora(rank=3, targets=BOTH))
    shown = select_targets_of(str(tmp_path), Lora(rank=3, targets=BOTH))
    assert {each.module: (each.rank, each.parameters) for each in shown} == report.targets


@pytest.mark.parametrize("more", [{"dora": True}, {"dropout": 0.1}, {"start": "pissa"}])
def test_what_stacks_cannot_do_is_refused_and_leaves_the_model_unchanged(more):
    model = build("mixtral")
    modules = dict(model.named_modules())
    with pytest.raises(RequestError, match="cannot be used on stacked experts"):
        attach(model, Lora(rank=2, targets=(*BOTH, "q_proj"), **more))
    with pytest.raises(RequestError, match="rank 64 is larger than this 48 x 32"):
        attach(model, Lora(rank=64, targets=BOTH))
    assert dict(model.named_modules()) == modules
