"""What the kernels of training must do, run by ``test_units_gpu`` in a process of its own.

On a GPU they are compiled; elsewhere Triton's interpreter runs them, and a process must
choose that before it imports Triton.  Prints one line of JSON: the error of each check.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from contextlib import contextmanager

import torch

from lorakeet.models import head_gpu, kernels, score, units, units_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of the largest number; Triton 3.9's interpreter cuts to bfloat16 where compiled code rounds
NEAR = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@contextmanager
def kernels_on(is_on=True):
    """Inside, the units are computed by the kernels, or by the references, on any device."""
    former = kernels.has_kernels
    kernels.has_kernels = lambda x: is_on
    try:
        yield
    finally:
        kernels.has_kernels = former


def normal(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def answers_of(unit, inputs, num_trained):
    """A unit's answer and the gradients of its first inputs, under one random slope."""
    inputs = [x.detach().clone().requires_grad_(i < num_trained) if torch.is_tensor(x) else x
              for i, x in enumerate(inputs)]  # fmt: skip
    y = unit(*inputs)
    slope = normal(*y.shape, seed=9, dtype=torch.bfloat16).to(y.dtype)  # the same numbers
    return [y.detach(), *torch.autograd.grad(y, inputs[:num_trained], slope)]


def check_unit(unit, inputs, num_trained):
    """The kernel on these inputs against the reference on the same numbers in float64."""
    wide = [x.double() if torch.is_tensor(x) else x for x in inputs]
    with kernels_on(False):
        expected = answers_of(unit, wide, num_trained)
    with kernels_on():
        found = answers_of(unit, inputs, num_trained)
    for one, other, given in zip(found, expected, [inputs[0], *inputs], strict=False):
        assert one.dtype == given.dtype and one.shape == other.shape
        check_near(one, other, NEAR[inputs[0].dtype])


def check_near(found, expected, near):
    assert torch.isfinite(found).all()
    error = float((found.double() - expected.double()).abs().max())
    largest = float(expected.abs().max())
    assert error <= near * largest + 1e-12, (error, largest)


def norms_equal_the_reference():
    for dtype in NEAR:
        for shape in ((5, 7), (2, 3, 64), (1, 1, 100)):
            x, w = normal(*shape, dtype=dtype) * 3, normal(shape[-1], seed=1, dtype=dtype)
            for num_trained in (1, 2):
                check_unit(lambda x, w: units.RmsNorm.apply(x, w, 1e-5), (x, w), num_trained)
    former, units_gpu.PROGRAMS = units_gpu.PROGRAMS, 3
    rows, w = normal(8, 8), normal(8, seed=1)  # more rows than programs add up dw
    check_unit(lambda x, w: units.RmsNorm.apply(x, w, 1e-6), (rows, w), 2)
    units_gpu.PROGRAMS = former
    cut = normal(4, 6, 8).transpose(0, 1)
    check_unit(lambda x, w: units.RmsNorm.apply(x, w, 1e-6), (cut, w), 2)


def norms_take_a_wider_weight():
    with kernels_on():
        x, w = normal(3, 8, dtype=torch.bfloat16), normal(8, seed=1)
        y = units.RmsNorm.apply(x, w, 1e-6)
    assert y.dtype == torch.bfloat16
    wide = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w
    check_near(y, wide, NEAR[torch.bfloat16])


def gates_equal_the_reference():
    for act in units.ACTIVATIONS:
        for dtype in NEAR:
            g, u = normal(3, 5, 70, dtype=dtype) * 3, normal(3, 5, 70, seed=1, dtype=dtype)
            check_unit(lambda g, u, act=act: units.Gate.apply(g, u, act), (g, u), 2)
        both = normal(2, 4, 24)  # a fused projection hands out two views of one array
        parts = both[..., :12], both[..., 12:]
        check_unit(lambda g, u, act=act: units.Gate.apply(g, u, act), parts, 2)


def rotations_equal_the_reference():
    for dtype in NEAR:
        for width, turned in ((8, 8), (20, 12)):
            angles = torch.rand(2, 7, turned // 2, generator=torch.Generator().manual_seed(2)) * 6
            cos, sin = (torch.cat([f(angles)] * 2, -1).to(DEVICE, dtype)
                        for f in (torch.cos, torch.sin))  # fmt: skip
            x = normal(2, 7, 3, width, dtype=dtype).transpose(1, 2)  # as q comes: [B, H, T, D]
            heads_second = (x, cos[:, None], sin[:, None])
            one_for_all = (x, cos[:1, None], sin[:1, None])
            heads_third = (x.transpose(1, 2).contiguous(), cos[:, :, None], sin[:, :, None])
            for inputs in (heads_second, one_for_all, heads_third):
                check_unit(units.Rotate.apply, inputs, 1)


def losses_equal_the_reference():
    for dtype in NEAR:
        for rows, size in ((3, 5), (2, 9000)):  # 9,000 takes three turns
            for soft_cap in (None, 6.0):
                logits = normal(rows, size, dtype=dtype) * 8
                targets = torch.arange(rows, device=DEVICE) * 7919 % size
                wide = logits.double().requires_grad_()
                bent = soft_cap * torch.tanh(wide / soft_cap) if soft_cap else wide
                expected = torch.nn.functional.cross_entropy(bent, targets, reduction="none")
                (slope,) = torch.autograd.grad(expected.sum(), wide)
                for cross_entropy in (head_gpu.cross_entropy, score.cross_entropy):
                    looked, none = cross_entropy(
                        logits.clone(), targets, soft_cap, wants_gradient=False
                    )
                    losses, found = cross_entropy(
                        logits.clone(), targets, soft_cap, wants_gradient=True
                    )
                    assert none is None and torch.equal(looked, losses)
                    assert losses.dtype == torch.float32
                    check_near(losses, expected.detach(), 2e-6)
                    check_near(found, slope, NEAR[dtype])


def losses_stand_extreme_logits():
    logits = torch.zeros(2, 40, device=DEVICE)
    logits[0, 3], logits[1, 4] = 3e4, -3e4
    targets = torch.tensor([3, 4], device=DEVICE)
    losses, p = head_gpu.cross_entropy(logits, targets, None, wants_gradient=True)
    assert float(losses[0]) == 0 and abs(float(losses[1]) - 3e4) < 4
    assert torch.isfinite(p).all() and float(p.sum(1).abs().max()) < 1e-5
    bad = torch.full((1, 40), float("nan"), device=DEVICE)
    assert torch.isnan(head_gpu.cross_entropy(bad, targets[:1], None, wants_gradient=False)[0])


def heads_score_the_same():
    head = torch.nn.Linear(12, 50).to(DEVICE)
    targets = torch.arange(20, device=DEVICE)
    for soft_cap in (None, 3.0):
        found = []
        for is_on in (True, False):
            hidden = normal(20, 12).requires_grad_()
            with kernels_on(is_on):
                loss = score.score_hidden(hidden, head, targets, soft_cap)
                wanted = [hidden, head.weight, head.bias]
                found.append([loss.detach(), *torch.autograd.grad(loss, wanted)])
        for one, other in zip(*found, strict=True):
            check_near(one, other, 3e-6)


def models_train_the_same():
    """A whole Gemma 2 with adapters, soft cap and tanh gate, and the proof of its fast units."""
    from lorakeet.adapters.attach import adapter_parameters, attach
    from lorakeet.adapters.settings import Lora
    from lorakeet.models.fast import fast_units
    from tests.families import build, some_ids

    found = []
    for is_on in (True, False):
        torch.manual_seed(0)
        model = build("gemma2").to(DEVICE)
        attach(model, Lora(rank=2, alpha=4, targets=("q_proj", "down_proj")))
        with torch.no_grad():
            for each in adapter_parameters(model).values():
                each.copy_(normal(*each.shape) * 0.1)
        ids = some_ids().to(DEVICE)
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        with kernels_on(is_on), fast_units(model) as taken:
            mask = everywhere.clone()
            mask[:, 0] = False
            loss, _ = score.score_targets(model, ids, everywhere, mask)
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), *gradients])
        assert taken["rms-norm"] >= 5 and taken["gate"] == 2 and taken["rotation"] == 1
    assert len(found[0]) > 5
    for one, other in zip(*found, strict=True):
        check_near(one, other, 2e-5)


def units_of_16_bits_are_proved():
    """The proof of a bfloat16 model bears what its roundings do to float32 adapters."""
    from lorakeet.adapters.attach import attach
    from lorakeet.adapters.settings import Lora
    from lorakeet.models.fast import fast_units
    from tests.families import build

    model = build("gemma2").to(DEVICE, torch.bfloat16)
    attach(model, Lora(rank=2, alpha=4))
    with kernels_on(), fast_units(model) as taken:
        assert taken["gate"] == 2 and taken["rms-norm"] >= 5


CHECKS = (
    norms_equal_the_reference,
    norms_take_a_wider_weight,
    gates_equal_the_reference,
    rotations_equal_the_reference,
    losses_equal_the_reference,
    losses_stand_extreme_logits,
    heads_score_the_same,
    models_train_the_same,
    units_of_16_bits_are_proved,
)


def run_checks():
    """The error of each check that fails."""
    errors = {}
    for check in CHECKS:
        started = time.perf_counter()
        try:
            check()
        except (AssertionError, RuntimeError):
            errors[check.__name__] = traceback.format_exc(limit=-3)
        print(check.__name__, round(time.perf_counter() - started, 2), file=sys.stderr)
    return errors


if __name__ == "__main__":
    print(json.dumps(run_checks()))
