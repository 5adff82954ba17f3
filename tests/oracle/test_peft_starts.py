"""PiSSA against PEFT: the same principal product, answers, gradients and plain LoRA files."""

import json

import pytest
import torch

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from tests.families import build, some_ids

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
FAMILIES = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_fc"), "bert": ("query",)}
families = pytest.mark.parametrize("family", FAMILIES)
starts = pytest.mark.parametrize("start", ["pissa", "pissa-fast"])


def answer(model):
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


def peft_model(family, start, **options):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(FAMILIES[family]),
        init_lora_weights="pissa" if start == "pissa" else "pissa_niter_16", **options,
    )  # fmt: skip
    return peft.get_peft_model(build(family), config).eval()


def ours_model(family, start, **options):
    model = build(family)
    attach(model, Lora(rank=4, alpha=6, targets=FAMILIES[family], start=start, **options))
    return model


def pair_up(ours, theirs):
    """Our and PEFT's parameter of each name; ours get PEFT's values, moved a little."""
    generator = torch.Generator().manual_seed(3)
    other = dict(theirs.base_model.model.named_parameters())
    pairs = {}
    for name, parameter in adapter_parameters(ours).items():
        twin = other.get(name) if name in other else other[f"{name}.weight"]
        with torch.no_grad():
            twin.add_(torch.randn(twin.shape, generator=generator) * 0.05)
            parameter.copy_(twin)
        pairs[name] = (parameter, twin)
    return pairs


@families
@starts
def test_the_start_is_pefts_up_to_signs_and_leaves_the_answers(family, start):
    ours, theirs = ours_model(family, start), peft_model(family, start)
    assert torch.equal(answer(ours), answer(build(family)))
    assert torch.allclose(answer(ours), answer(theirs), atol=1e-5)
    if start == "pissa-fast":
        return  # two sketches of random weights find other directions
    own, other = adapter_parameters(ours), dict(theirs.base_model.model.named_parameters())
    for name in own:
        if ".lora_A." in name:
            B = name.replace("lora_A", "lora_B")
            assert torch.allclose(own[B] @ own[name], other[B] @ other[name], atol=1e-5)


@families
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_answers_and_gradients_of_a_trained_one_equal_pefts(family, dora, rslora):
    ours = ours_model(family, "pissa", dora=dora, rslora=rslora)
    theirs = peft_model(family, "pissa", use_dora=dora, use_rslora=rslora)
    pairs = pair_up(ours, theirs)
    for model in (ours, theirs):
        model(input_ids=some_ids()).logits.square().mean().backward()
    assert torch.allclose(answer(ours), answer(theirs), atol=1e-5)
    for name, (parameter, twin) in pairs.items():
        scale = twin.grad.abs().max().clamp(min=1e-3)
        assert (parameter.grad - twin.grad).abs().max() / scale < 2e-5, name


@families
@starts
@pytest.mark.parametrize("rslora", [False, True])
def test_our_file_is_a_plain_lora_that_peft_loads_on_the_original_base(
    family, start, rslora, tmp_path
):
    ours = ours_model(family, start, rslora=rslora, rank_pattern={FAMILIES[family][0]: 3})
    with torch.no_grad():
        for parameter in adapter_parameters(ours).values():
            parameter.mul_(1.1)
    write_adapter(ours, tmp_path / "a", base="none")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["init_lora_weights"] is True
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "a").eval()
    assert torch.allclose(answer(theirs), answer(ours), atol=1e-5)


def test_pefts_converted_file_answers_the_same_here(tmp_path):
    theirs = peft_model("llama", "pissa")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    theirs.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    ours = build("llama")
    read_adapter(ours, tmp_path / "a")
    assert torch.allclose(answer(ours), answer(theirs), atol=1e-5)


@pytest.mark.parametrize(("start", "above"), [("pissa", 1e-5), ("pissa-fast", 1e-3)])
def test_the_start_leaves_the_smallest_residual_of_its_rank(start, above):
    model = ours_model("llama", start)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    A, B = layer.factors("default")
    residual = layer.weight - layer.scales["default"] * B @ A
    least = torch.linalg.svdvals(layer.weight)[4:].norm()
    assert least * (1 - 1e-5) < residual.norm() < least * (1 + above)
