"""Trained biases: each adapter has its own, and the base and other adapters never see them."""

import json

import pytest
import torch

from lorakeet.adapters.attach import (
    adapter_parameters,
    attach,
    detach,
    no_adapter,
    set_active,
)
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.merge import merge, unmerge
from lorakeet.adapters.strength import set_strength
from lorakeet.base.errors import RequestError
from tests.families import build, some_ids

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
CASES = [("gpt2", "all"), ("gpt2", "lora_only"), ("bert", "all"), ("bert", "lora_only")]
cases = pytest.mark.parametrize(("family", "bias"), CASES)
NAMES = {"gpt2": ("c_attn", "c_fc"), "bert": ("query", "intermediate.dense")}


def answer(model):
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


def build_moved(family, bias, name="default", **more):
    """A tiny model whose base biases are not zero, with an adapter as training leaves one."""
    model = build_biased(family)
    saved = ("classifier",) if family == "bert" else ()
    attach(
        model, Lora(rank=2, targets=NAMES[family], bias=bias, modules_to_save=saved, **more),
        name=name,
    )  # fmt: skip
    move(model, name)
    return model


def build_biased(family):
    model = build(family)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def move(model, name, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@cases
def test_step_0_is_the_base_and_exactly_the_asked_biases_are_trained(family, bias):
    model = build_biased(family)
    before, modules = answer(model), dict(model.named_modules())
    num_all = sum(name.endswith("bias") for name, _ in model.named_parameters())
    report = attach(model, Lora(rank=2, targets=NAMES[family], bias=bias))
    assert torch.equal(answer(model), before)
    trained = [name for name in adapter_parameters(model) if ".trained_bias." in name]
    assert len(trained) == (num_all if bias == "all" else len(report.targets))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(
        adapter_parameters(model)
    )
    move(model, "default")
    model(input_ids=some_ids()).logits.square().mean().backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == set(adapter_parameters(model))
    assert not torch.allclose(answer(model), before)
    with no_adapter(model):
        assert torch.equal(answer(model), before)
    detach(model)
    assert torch.equal(answer(model), before) and dict(model.named_modules()) == modules


@cases
@pytest.mark.parametrize("dora", [False, True])
def test_merging_keeps_the_answers_and_unmerging_every_bit(family, bias, dora):
    model = build_moved(family, bias, dora=dora)
    apart = answer(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    merge(model)
    assert torch.allclose(answer(model), apart, atol=2e-5)
    unmerge(model)
    assert torch.equal(answer(model), apart)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    merge(model)
    detach(model)
    assert torch.allclose(answer(model), apart, atol=2e-5)


@cases
def test_adapters_with_biases_switch_without_touching_each_other(family, bias):
    model = build_moved(family, bias, "one")
    answers = {"one": answer(model)}
    saved = ("classifier",) if family == "bert" else ()
    attach(model, Lora(rank=2, targets=NAMES[family][:1], modules_to_save=saved), name="two")
    move(model, "two", 6)
    answers["two"] = answer(model)
    for name in ("one", "two", "one"):
        set_active(model, name)
        assert torch.equal(answer(model), answers[name])
    detach(model, "one")
    set_active(model, "two")
    assert torch.equal(answer(model), answers["two"])


@cases
def test_files_go_both_ways_with_peft(family, bias, tmp_path):
    ours = build_moved(family, bias)
    write_adapter(ours, tmp_path / "ours", base="none")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["bias"] == bias
    theirs = peft.PeftModel.from_pretrained(build_biased(family), tmp_path / "ours").eval()
    assert torch.allclose(answer(theirs), answer(ours), atol=1e-5)
    back = build_biased(family)
    read_adapter(back, tmp_path / "ours")
    assert torch.equal(answer(back), answer(ours))

    kind = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    config = peft.LoraConfig(
        r=2, target_modules=list(NAMES[family]), bias=bias, task_type=kind,
        fan_in_fan_out=family == "gpt2", init_lora_weights=False,
    )  # fmt: skip
    made = peft.get_peft_model(build_biased(family), config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(0.1)
    made.save_pretrained(tmp_path / "theirs")
    other = build_biased(family)
    assert read_adapter(other, tmp_path / "theirs").bias == bias
    assert torch.allclose(answer(other), answer(made), atol=1e-5)


def test_what_biases_cannot_do_is_refused():
    with pytest.raises(RequestError, match="bias is some"):
        Lora(bias="some")
    with pytest.raises(RequestError, match="bias"):
        set_strength(build_moved("gpt2", "all"), 0.5)
