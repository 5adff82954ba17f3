"""LoRA on two-dimensional convolutions: PEFT's answers and files, and right where PEFT fails."""

import pytest
import torch
from torch import nn

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.file_names import to_file_names
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.merge import merge, unmerge
from lorakeet.base.errors import RequestError
from tests.oracle.test_peft_random import to_peft_name

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
OPTIONS = {
    "plain": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "pissa": {"start": "pissa"},
    "bias": {"bias": "lora_only"}, "dora-bias": {"dora": True, "bias": "all"},
}  # fmt: skip
options = pytest.mark.parametrize("option", OPTIONS)


class Picture(nn.Module):
    """Two convolutions and a linear head."""

    def __init__(self, **more):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, kernel_size=(3, 2), stride=2, padding=1, **more)
        self.point = nn.Conv2d(8, 6, kernel_size=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.point(self.patches(x).relu()).mean((2, 3)))


def picture(rows=2):
    return torch.randn(rows, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def build_moved(option, **more):
    model = Picture(**more).eval()
    settings = {"rank": 3, "alpha": 5, "targets": ("patches", "point"), **OPTIONS[option]}
    attach(model, Lora(**settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@options
def test_step_0_is_the_base(option):
    model = Picture().eval()
    before = model(picture())
    attach(model, Lora(rank=3, targets=("patches", "point"), **OPTIONS[option]))
    assert torch.allclose(model(picture()), before, atol=1e-6)


@options
def test_answers_gradients_and_files_equal_pefts(option, tmp_path):
    ours = build_moved(option)
    write_adapter(ours, tmp_path / "a", base="none")
    theirs = peft.PeftModel.from_pretrained(Picture(), tmp_path / "a", is_trainable=True).eval()
    outputs = [model(picture()) for model in (ours, theirs)]
    assert torch.allclose(*outputs, atol=1e-5)
    if option != "pissa":  # whose file holds twice the rank
        for output in outputs:
            output.square().mean().backward()
        others = {to_peft_name(n): p for n, p in theirs.named_parameters() if p.requires_grad}
        own = to_file_names(ours, "default")
        assert own.keys() == others.keys()
        for name, parameter in own.items():
            wanted = others[name].grad
            scale = wanted.abs().max().clamp(min=1e-3)
            assert (parameter.grad - wanted).abs().max() / scale < 1e-5, name
    theirs.save_pretrained(tmp_path / "b")
    back = Picture().eval()
    read_adapter(back, tmp_path / "b")
    assert torch.allclose(back(picture()), outputs[0], atol=1e-5)


@options
def test_merging_keeps_the_answers_and_unmerging_every_bit(option):
    model = build_moved(option)
    apart, weight = model(picture()), model.patches.weight.detach().clone()
    merge(model)
    assert torch.allclose(model(picture()), apart, atol=1e-5)
    assert not torch.equal(model.patches.weight, weight)
    unmerge(model)
    assert torch.equal(model.patches.weight, weight) and torch.equal(model(picture()), apart)


@pytest.mark.parametrize("more", [{"dilation": 2}, {"padding_mode": "circular"}])
def test_dilation_and_padding_are_those_of_the_base_so_that_merging_is_exact(more):
    """PEFT 0.21 builds A's convolution without them: it fails, or reads other pixels."""
    model = build_moved("plain", **more)
    apart = model(picture())
    merge(model)
    assert torch.allclose(model(picture()), apart, atol=1e-5)


def test_what_no_product_can_change_is_refused():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(4, 8, 3, groups=2)

    model = Grouped()
    with pytest.raises(RequestError, match="2 groups"):
        attach(model, Lora(rank=2, targets=("patches",)))
    assert type(model.patches) is nn.Conv2d
