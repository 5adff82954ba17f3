"""VeRA against PEFT: answers, gradients, and files both ways with A and B or by their key."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.merge import merge, unmerge
from lorakeet.adapters.settings import Lora
from lorakeet.adapters.stored import read_stored
from lorakeet.base.errors import FileFormatError, RequestError
from lorakeet.base.run_folder import read_json
from tests.families import build, some_ids
from tests.oracle.test_peft_random import near

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
FAMILIES = ["llama", "gpt2"]
WEIGHTS = "adapter_model.safetensors"


def move(parameters, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def answer(model):
    return model(input_ids=some_ids()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_our_file_and_has_our_answers_and_gradients(family, tmp_path):
    base = build(family)
    ours = deepcopy(base)
    attach(ours, Lora(rank=40, vera=7))  # above a matrix's sizes, which VeRA allows
    move(adapter_parameters(ours).values())
    write_adapter(ours, tmp_path, base="x")
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path, is_trainable=True).eval()
    for model in (ours, theirs):
        answer(model).square().mean().backward()
    assert near(answer(theirs), answer(ours))
    other = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    own = adapter_parameters(ours)
    assert len(own) == len(other) > 0
    for path, parameter in own.items():
        assert near(parameter.grad, other[f"base_model.model.{path}"]), path
    plain = answer(ours)
    merge(ours)
    assert near(answer(ours), plain)
    unmerge(ours)
    assert torch.equal(answer(ours), plain)


@pytest.mark.parametrize("has_projections", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_file_answers_the_same_here(family, has_projections, tmp_path):
    base = build(family)
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    config = peft.VeraConfig(
        r=16, target_modules=targets, projection_prng_key=5, save_projection=has_projections,
        fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(deepcopy(base), config).eval()
    move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    assert ("base_model.vera_A" in load_file(tmp_path / "theirs" / WEIGHTS)) == has_projections
    model = deepcopy(base)
    settings = read_adapter(model, tmp_path / "theirs")
    assert settings.vera == 5
    assert near(answer(model), answer(theirs))
    write_adapter(model, tmp_path / "again", base="x")
    again = deepcopy(base)
    read_adapter(again, tmp_path / "again")
    assert torch.equal(answer(again), answer(model))


def test_what_vera_does_not_have_is_refused(tmp_path):
    model = build("llama")
    with pytest.raises(RequestError, match="so dora cannot be on.*so alpha_pattern cannot be on"):
        Lora(vera=0, dora=True, alpha_pattern={"q_proj": 2})
    with pytest.raises(RequestError, match="VeRA adapts linear layers, not embeddings"):
        attach(model, Lora(vera=0, targets="embed_tokens"))
    attach(model, Lora(vera=0, rank=8))
    write_adapter(model, tmp_path, base="x")
    with pytest.raises(FileFormatError, match="VeRA adapter.*lorakeet merge"):
        read_stored(tmp_path)
    (tmp_path / "lorakeet.json").unlink()
    tensors = load_file(tmp_path / WEIGHTS)
    assert read_json(tmp_path / "adapter_config.json")["save_projection"]
    save_file({k: t for k, t in tensors.items() if k != "base_model.vera_A"}, tmp_path / WEIGHTS)
    with pytest.raises(FileFormatError, match="missing: base_model.vera_A"):
        read_adapter(build("llama"), tmp_path)
