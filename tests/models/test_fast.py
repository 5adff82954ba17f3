"""Fast units: proved against the modules that they stand for, and gone afterwards."""

import pytest
import torch

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.fused import LoraProduct
from lorakeet.adapters.linear import Plain
from lorakeet.adapters.settings import Lora
from lorakeet.models.fast import fast_units
from lorakeet.models.mlp import AdaptedMlp, run_adapted
from lorakeet.models.units import ACTIVATIONS, Dropout, Gate, RmsNorm, Rotate
from tests.families import DECODERS, build, some_ids

GATED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2")


def loss_and_gradients(model):
    ids = some_ids()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(DECODERS))
@pytest.mark.parametrize("adapted", [True, False])
def test_a_model_trains_the_same_with_fast_units(family, adapted):
    model = build(family)
    if adapted:
        attach(model, Lora(rank=2, alpha=4))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapter_parameters(model).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    loss, expected = loss_and_gradients(model)
    with fast_units(model) as found:
        fast_loss, gradients = loss_and_gradients(model)
    if family in GATED:
        assert found["gate"] == 2 and found["rms-norm"] >= 5 and found["rotation"] == 1
    torch.testing.assert_close(fast_loss, loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1e-8
        assert float((gradients[name] - gradient).abs().max()) <= 2e-5 * scale + 1e-8, name
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_unit_that_differs_is_not_used():
    model = build("llama")

    class OddNorm(type(model.model.norm)):
        def forward(self, x):
            return super().forward(x) * 1.001

    model.model.norm.__class__ = OddNorm
    with fast_units(model) as found:
        assert found["rms-norm"] == 4
        assert "forward" not in model.model.norm.__dict__


def test_the_rotation_of_the_family_comes_back():
    import transformers.models.llama.modeling_llama as home

    original = home.apply_rotary_pos_emb
    with fast_units(build("llama")):
        assert home.apply_rotary_pos_emb is not original
    assert home.apply_rotary_pos_emb is original


def doubles(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_the_gradients_of_the_units_are_right_to_the_last_digit():
    check = torch.autograd.gradcheck
    assert check(lambda x, w: RmsNorm.apply(x, w, 1e-5), (doubles(3, 6), doubles(6)))
    for act in ACTIVATIONS:
        assert check(
            lambda g, u, act=act: Gate.apply(g, u, act), (doubles(3, 6), doubles(4, 6)[:3])
        )
    angles = torch.rand(5, 3, dtype=torch.float64)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    for width in (6, 8):  # whole heads, and the first 6 of 8 coordinates
        assert check(lambda x: Rotate.apply(x, cos, sin), (doubles(2, 5, width),))


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_fused_product_equals_its_formula_and_gradients(has_bias):
    x, A, B = doubles(2, 5, 7), doubles(3, 7), doubles(4, 3)
    W0 = doubles(4, 7).detach()
    b = doubles(4).detach() if has_bias else None
    found = LoraProduct.apply(x, W0, b, A, B, 0.5)
    expected = torch.nn.functional.linear(x, W0, b) + 0.5 * (x @ A.T @ B.T)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(
        lambda x, A, B: LoraProduct.apply(x, W0, b, A, B, 0.5), (x, A, B)
    )


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_fused_feed_forward_part_equals_its_formula_and_gradients(act):
    x, sizes = doubles(2, 5, 7), ((4, 7), (4, 7), (7, 4))
    factors = [f for out, num_in in sizes for f in (doubles(3, num_in), doubles(out, 3))]
    frozen = [(doubles(*size).detach(), doubles(size[0]).detach()) for size in sizes]

    def parts(*factors):
        return tuple(
            Plain(base=W0, b=b, A=A, B=B, s=0.5)
            for (W0, b), A, B in zip(frozen, factors[::2], factors[1::2], strict=True)
        )

    def fused(x, *factors):
        return AdaptedMlp.apply(x, parts(*factors), act, *factors)

    def plain(x, *factors):
        first, second, last = (
            lambda x, p=p: torch.nn.functional.linear(x, p.base, p.b) + p.s * (x @ p.A.T @ p.B.T)
            for p in parts(*factors)
        )
        return last(Gate.apply(first(x), second(x), act))

    torch.testing.assert_close(fused(x, *factors), plain(x, *factors))
    assert torch.autograd.gradcheck(fused, (x, *factors))


def test_a_feed_forward_part_that_is_more_than_lora_is_not_fused():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 3, mlp.gate_proj.in_features)
    attach(model, Lora(rank=2, alpha=4, dropout=0.5))
    model.train()
    assert run_adapted(mlp, "silu", x) is None
    model.eval()
    assert run_adapted(mlp, "silu", x) is not None
    handle = mlp.up_proj.register_forward_hook(lambda module, inputs, output: output)
    assert run_adapted(mlp, "silu", x) is None
    handle.remove()
    mlp.down_proj.base_layer.weight.requires_grad_(True)
    assert run_adapted(mlp, "silu", x) is None


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_a_norm_of_16_bits_is_rounded_once(weight_dtype):
    x, w = doubles(3, 40).detach().bfloat16() * 3, doubles(40).detach().to(weight_dtype)
    dy = doubles(3, 40).detach().bfloat16()
    found, expected = [], []
    for wide, answers in ((None, found), (torch.float64, expected)):
        given = x.to(wide or x.dtype).requires_grad_(), w.to(wide or w.dtype).requires_grad_()
        y = RmsNorm.apply(*given, 1e-6)
        answers += [y, *torch.autograd.grad(y, given, dy.to(y.dtype))]
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, weight_dtype]
    for one, right in zip(found, expected, strict=True):
        assert (one.double() - right).abs().max() <= right.abs().max() / 200


def test_products_of_a_norm_keep_its_input_and_have_the_same_gradients():
    x, w, A, B = doubles(1, 6, 7), doubles(7), doubles(3, 7), doubles(4, 3)
    W0, kept, norms = doubles(4, 7).detach(), set(), []

    def keep(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    def run(change):
        n = RmsNorm.apply(x, w, 1e-5)
        norms.append(n)
        read = n if change is None else change(n)
        return LoraProduct.apply(read, W0, None, A, B, 0.5).sin().sum()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = torch.autograd.grad(run(None), (x, w, A, B))
    assert x.data_ptr() in kept and norms[0].data_ptr() not in kept
    expected = torch.autograd.grad(run(torch.clone), (x, w, A, B))  # a copy is no norm's answer
    torch.testing.assert_close(found, expected)

    changed = torch.autograd.grad(run(lambda n: n.detach().mul_(2)), A)
    expected = torch.autograd.grad(run(lambda n: n.detach() * 2), A)
    torch.testing.assert_close(changed, expected)
    with torch.no_grad():
        n = RmsNorm.apply(x, w, 1e-5)
        n.mul_(2)
    (changed,) = torch.autograd.grad(LoraProduct.apply(n, W0, None, A, B, 0.5).sin().sum(), A)
    torch.testing.assert_close(changed, expected[0])


def test_dropout_keeps_the_mean_drops_at_its_rate_and_masks_its_gradient_alike():
    x = torch.ones(400_003, requires_grad=True)
    for p in (0.1, 0.5):
        torch.manual_seed(0)
        y = Dropout.apply(x, p)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, y.detach())
        assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.003)
        assert float(y.detach().max()) == pytest.approx(1 / (1 - p), rel=1e-4)
        assert float(y[1:].eq(0).logical_and(y[:-1].eq(0)).float().mean()) == pytest.approx(
            p * p, abs=0.003
        )
        torch.manual_seed(0)
        assert torch.equal(Dropout.apply(x, p), y)


def test_dropout_is_the_fast_one_in_training_alone():
    model = build("bert")
    with fast_units(model) as found:
        assert found["dropout"] == sum(isinstance(m, torch.nn.Dropout) for m in model.modules())
        drop = model.train().dropout
        x = torch.randn(4, 50)
        torch.manual_seed(0)
        y = drop(x)
        torch.manual_seed(0)
        assert torch.equal(Dropout.apply(x, drop.p), y) and not torch.equal(x, y)
        assert torch.equal(drop.eval()(x), x)
