"""AdaLoRA against PEFT: the same ranks from the same gradients, the same loss, both files."""

import json

import pytest
import torch

from lorakeet.adapters.adalora import build_allocator
from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.settings import AdaLora
from tests.families import build, some_ids

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
STEPS = 100
FAMILIES = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_fc")}
families = pytest.mark.parametrize("family", FAMILIES)


def answer(model):
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


def pair(family):
    """One adapter here and in PEFT with equal weights, and the pairs of their parameters."""
    ours = build(family)
    budget = AdaLora(target_rank=2, warmup_fraction=0.1, settle_fraction=0.3, every_steps=10)
    attach(ours, Lora(rank=6, alpha=12, targets=FAMILIES[family], adalora=budget))
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=12, tinit=10, tfinal=30, deltaT=10, total_step=STEPS,
        target_modules=list(FAMILIES[family]), task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(build(family), config).eval()
    other = dict(theirs.base_model.model.named_parameters())
    pairs = {}
    for name, parameter in adapter_parameters(ours).items():
        twin = other[name.removesuffix(".weight")]
        with torch.no_grad():
            twin.copy_(parameter)
        pairs[name] = (parameter, twin)
    return ours, theirs, pairs


def train_both(family, seed):
    """100 steps on our gradients, which PEFT's parameters are given too."""
    ours, theirs, pairs = pair(family)
    allocator = build_allocator(ours, STEPS)
    sides = list(zip(*pairs.values(), strict=True))
    optimizers = [torch.optim.AdamW(side, lr=5e-3) for side in sides]
    for step in range(1, STEPS + 1):
        ids = some_ids(seed=seed * 1000 + step)
        (ours(input_ids=ids, labels=ids).loss + allocator.penalty()).backward()
        for parameter, twin in pairs.values():
            twin.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        allocator.update(step)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, (parameter, twin) in pairs.items():
            if ".lora_E." in name:
                assert torch.equal(parameter == 0, twin == 0), (step, name)
    return ours, theirs, allocator


@families
@pytest.mark.parametrize("seed", [1, 2])
def test_the_rank_pattern_equals_pefts_after_100_steps_on_the_same_gradients(family, seed):
    ours, theirs, allocator = train_both(family, seed)
    pattern = theirs.peft_config["default"].rank_pattern
    found = {name.removesuffix(".lora_E.default"): sum(kept) for name, kept in pattern.items()}
    own = allocator.ranks()
    assert own == found
    assert sum(own.values()) == 2 * len(own) and len(set(own.values())) > 1
    assert torch.allclose(answer(ours), answer(theirs), atol=1e-5)


@families
def test_loss_with_penalty_and_its_gradients_equal_pefts(family):
    ours, theirs, pairs = pair(family)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter, twin in pairs.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            twin.copy_(parameter)
    ids = some_ids()
    own = ours(input_ids=ids, labels=ids).loss + build_allocator(ours, STEPS).penalty()
    other = theirs(input_ids=ids, labels=ids).loss
    assert torch.allclose(own, other, rtol=1e-6)
    own.backward()
    other.backward()
    for name, (parameter, twin) in pairs.items():
        scale = twin.grad.abs().max().clamp(min=1e-3)
        assert (parameter.grad - twin.grad).abs().max() / scale < 1e-5, name


@families
def test_files_go_both_ways(family, tmp_path):
    ours, theirs, allocator = train_both(family, 1)
    write_adapter(ours, tmp_path / "ours", base="none")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["rank_pattern"] == {p: r for p, r in allocator.ranks().items() if r}
    loaded = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    assert torch.allclose(answer(loaded), answer(ours), atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    back = build(family)
    read_adapter(back, tmp_path / "theirs")
    assert torch.allclose(answer(back), answer(theirs), atol=1e-5)
