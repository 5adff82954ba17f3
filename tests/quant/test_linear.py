"""The frozen quantised layer: answers, exact gradients, state, moves; and adapters on it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch.nn import functional as F

from lorakeet.adapters.attach import adapter_parameters, attach, detach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.merge import merge
from lorakeet.adapters.settings import AdaLora, Lora
from lorakeet.adapters.targets import linear_names
from lorakeet.base.errors import RequestError
from lorakeet.base.native_code import find_native_code
from lorakeet.quant.convert import (
    QuantizedForm,
    count_weights,
    dequantize_model,
    quantize_model,
    quantize_weight,
)
from lorakeet.quant.linear import QuantizedLinear, Scratch
from tests.families import ALL, build, some_ids

FORMS = {
    "nf4": QuantizedForm(double=False),
    "nf4-double": QuantizedForm(),
    "fp4": QuantizedForm(kind="fp4"),
    "int8": QuantizedForm(kind="int8"),
}


def make_layer(form, num_in=64, num_out=48, has_bias=True, scratch=None):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=draw)
    bias = torch.randn(num_out, generator=draw) if has_bias else None
    return QuantizedLinear(quantize_weight(weight, form), bias, scratch=scratch)


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answer_and_input_gradient_are_those_of_the_dequantised_weight(form, has_bias, dtype):
    layer = make_layer(form, has_bias=has_bias)
    x = torch.randn(7, 5, 64).to(dtype).requires_grad_()  # too many rows for a fused product
    other = x.detach().clone().requires_grad_()
    bias = layer.bias.to(dtype) if has_bias else None
    expected = F.linear(other, layer.weight.to(dtype), bias)
    found = layer(x)
    assert torch.equal(found, expected)
    dy = torch.randn(expected.shape).to(dtype)
    assert torch.equal(
        torch.autograd.grad(found, x, dy)[0], torch.autograd.grad(expected, other, dy)[0]
    )
    assert found.dtype == dtype
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("has_bias", [True, False])
def test_few_rows_are_answered_from_the_codes_without_a_scratch(form, has_bias):
    layer = make_layer(form, has_bias=has_bias)
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))
    assert find_native_code().is_usable == (not layer.scratch.held)
    dy = torch.randn(y.shape)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy @ layer.weight)


def test_the_gradient_passes_gradcheck_in_float64(form):
    layer = make_layer(form)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_backward_is_right_after_other_layers_used_the_scratch(form):
    scratch = Scratch()
    first, second = (make_layer(form, 64, size, scratch=scratch) for size in (128, 64))
    x = torch.randn(4, 64, requires_grad=True)
    y = first(x)
    second(torch.randn(2, 64))
    dy = torch.randn(y.shape)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy @ first.weight)


def test_layers_of_a_model_hold_one_scratch_of_the_largest():
    scratch = Scratch()
    for size in (64, 256, 128):
        make_layer(FORMS["nf4"], 64, size, scratch=scratch)(torch.randn(40, 64))
    assert [each.numel() for each in scratch.held.values()] == [256 * 64]


def test_threads_do_not_share_a_scratch():
    layer, x = make_layer(FORMS["nf4"]), torch.randn(64, 64)
    expected, wrong = layer(x), []

    def ask():
        wrong.extend(1 for _ in range(50) if not torch.equal(layer(x), expected))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_state_dict_round_trip_gives_the_same_weight(form):
    layer = make_layer(form)
    other = QuantizedLinear(quantize_weight(torch.ones(48, 64), form), torch.zeros(48))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.bias, layer.bias)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


def test_another_dtype_moves_the_bias_and_leaves_codes_and_scales(form):
    layer = make_layer(form)
    weight = layer.weight
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight.bfloat16())
    assert torch.equal(layer.float().weight, weight)


def test_the_layer_costs_what_its_form_says():
    sizes = {
        name: make_layer(form, 512, 512, has_bias=False).held_bytes / 512**2
        for name, form in FORMS.items()
    }
    assert sizes["nf4"] == 0.5625
    assert sizes["nf4-double"] == sizes["fp4"] == pytest.approx(0.516, abs=0.0005)
    assert sizes["int8"] == pytest.approx(1 + 4 / 512)


SMALL = {"falcon": 64}


def quantized_pair(family, form):
    """A quantised model and the plain one with the same dequantised weights."""
    model, plain = build(family), build(family)
    names = linear_names(model)
    quantize_model(model, names, form)
    quantize_model(plain, names, form)
    dequantize_model(plain)
    return model, plain, names


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_with_an_adapter_trains_as_the_plain_one_of_its_weights(family, kind):
    model, plain, names = quantized_pair(family, QuantizedForm(kind=kind))
    settings = Lora(rank=4, alpha=8)
    reports = [attach(each, settings, seed=3) for each in (model, plain)]
    assert list(reports[0].targets) == names == list(reports[1].targets)
    assert reports[0].total_parameters == reports[1].total_parameters == count_weights(model)
    ids = some_ids()
    for each in (model, plain):
        for name, parameter in adapter_parameters(each).items():
            if "lora_B" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        logits = each(input_ids=ids).logits
        torch.log_softmax(logits, -1).square().mean().backward()
    torch.testing.assert_close(
        model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=2e-5, atol=2e-5
    )
    expected = adapter_parameters(plain)
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        Lora(rank=4, dora=True), Lora(rank=4, start="pissa"), Lora(rank=4, dropout=0.3),
        Lora(rank=4, adalora=AdaLora(target_rank=2)), Lora(rank=4, rslora=True),
    ],
    ids=["dora", "pissa", "dropout", "adalora", "rslora"],
)  # fmt: skip
def test_every_form_of_adapter_sits_on_a_quantised_layer(settings):
    model, plain, _ = quantized_pair("llama", QuantizedForm())
    for each in (model, plain):
        attach(each, settings, seed=1)
        for name, parameter in adapter_parameters(each).items():
            if "lora_B" in name or "lora_E" in name:
                parameter.data.add_(0.1)
    ids = some_ids()
    torch.testing.assert_close(
        model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_adapter_file_is_the_one_of_the_plain_base(family, tmp_path):
    model, plain, _ = quantized_pair(family, QuantizedForm())
    for name, each in (("quantised", model), ("plain", build(family))):
        attach(each, Lora(rank=4), seed=5)
        write_adapter(each, tmp_path / name, base="x")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        ours, theirs = ((tmp_path / n / file).read_bytes() for n in ("quantised", "plain"))
        assert ours == theirs
    read_adapter(plain, tmp_path / "quantised")
    ids = some_ids()
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_merging_into_a_quantised_layer_is_refused_and_detaching_restores_it():
    model, _, names = quantized_pair("llama", QuantizedForm())
    ids = some_ids()
    before = model(input_ids=ids).logits
    attach(model, Lora(rank=4))
    with pytest.raises(RequestError, match=r"14 more .*|are quantised"):
        merge(model)
    detach(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert isinstance(model.get_submodule(names[0]), QuantizedLinear)


def test_dequantising_gives_plain_frozen_layers():
    model, plain, names = quantized_pair("gpt2", QuantizedForm())
    ids = some_ids()
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert type(plain.get_submodule(names[0])) is type(build("gpt2").get_submodule(names[0]))
    assert not plain.get_submodule(names[0]).weight.requires_grad


def rounded_rows(x):
    """The formula of a row: round(127 x / max |x|), and max |x| / 127."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    return (x * (127 / largest)).round().to(torch.int64), largest / 127


@pytest.mark.parametrize("num_in", [37, 64, 3000])  # one chunk, and several
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_rounded_inputs_are_sums_of_whole_numbers(num_in, dtype):
    layer = make_layer(QuantizedForm(kind="int8"), num_in=num_in, has_bias=False)
    layer.rounds_inputs = True
    x = torch.randn(5, num_in, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scales = rounded_rows(x.float())
    sums = codes @ layer.codes.to(torch.int64).T
    with torch.no_grad():
        found = layer(x)
        assert torch.equal(found, (sums.float() * scales * layer.scales).to(dtype))
        assert torch.equal(layer(x[2:3]), found[2:3])
    plain = x.float() @ layer.weight.T
    assert (found.float() - plain).abs().max() < 0.03 * plain.abs().max()


def test_rounded_inputs_of_zeros_and_nan_stay_in_their_row():
    layer = make_layer(QuantizedForm(kind="int8"), has_bias=False)
    layer.rounds_inputs = True
    x = torch.randn(3, 64)
    x[0], x[1, 3] = 0, torch.nan
    found = layer.multiply(x)
    assert (found[0] == 0).all() and found[1].isnan().all() and found[2].isfinite().all()
