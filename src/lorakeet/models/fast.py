"""Fast units in the place of a model's own modules while it trains, each one proved first.

Units are found by structure, not by class name: a norm is a module with one vector of
weights and an epsilon, a gated feed-forward part has gate_proj, up_proj and down_proj.
Before a unit stands for a module, both answer a random input, and their answers and
gradients must agree; a unit that differs is not used, and plain autograd stays.

Outside the ``with`` block the model is what it was, object for object.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakeet.models.mlp import PARTS, is_adapted, run_adapted
from lorakeet.models.units import ACTIVATIONS, Dropout, Gate, RmsNorm, Rotate, draws_fast

Forward = Callable[[Tensor], Tensor]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_EPSILONS = ("variance_epsilon", "eps", "epsilon")


@contextmanager
def fast_units(model: nn.Module) -> Iterator[dict[str, int]]:
    """Inside, the model's norms, gates and rotations are the proved fast ones, and its dropout.

    Yields:
        how many of each unit stand in, such as ``{"rms-norm": 61, "gate": 30, "rotation": 1}``.
    """
    found: Counter[str] = Counter()
    changed: list[nn.Module] = []
    proved: dict[Any, Any] = {}
    for module in model.modules():
        for name, propose in _UNITS.items():
            choice = _choose(module, name, propose, proved)
            if choice is not None:
                module.forward = choice
                changed.append(module)
                found[name] += 1
        if type(module) is nn.Dropout and 0 < module.p < 1 and "forward" not in vars(module):
            module.forward = partial(_drop, module)
            changed.append(module)
            found["dropout"] += 1
    homes = _patch_rotations(model)
    found.update({"rotation": len(homes)} if homes else {})
    try:
        yield dict(found)
    finally:
        for module in changed:
            del module.forward
        for home, original in homes:
            home.apply_rotary_pos_emb = original


def _choose(
    module: nn.Module,
    name: str,
    propose: Callable[[nn.Module], list[Forward]],
    proved: dict[Any, Any],
) -> Forward | None:
    """The first candidate that agrees with the module; equal modules are asked once."""
    candidates = propose(module)
    if not candidates or "forward" in module.__dict__:
        return None
    held = (*module.named_parameters(), *module.named_buffers())  # quantised layers hold buffers
    sizes = tuple((key, tuple(each.shape), each.dtype) for key, each in held)
    key = (name, type(module), sizes)
    if key not in proved:
        width = _width_of(module)
        proved[key] = next(
            (i for i, candidate in enumerate(candidates) if _agrees(module, candidate, width)), None
        )
    return None if proved[key] is None else candidates[proved[key]]


def _propose_norm(module: nn.Module) -> list[Forward]:
    """w n, and Gemma's (1 + w) n, for a module with one vector and an epsilon."""
    own = dict(module.named_parameters())
    epsilon = next((getattr(module, e) for e in _EPSILONS if hasattr(module, e)), None)
    if list(own) != ["weight"] or own["weight"].ndim != 1 or not isinstance(epsilon, float):
        return []
    return [
        lambda x: RmsNorm.apply(x, module.weight, epsilon),
        lambda x: RmsNorm.apply(x, module.weight.float() + 1, epsilon),  # 16 bits hold no 1 + w
    ]


def _drop(module: nn.Dropout, x: Tensor) -> Tensor:
    """torch's dropout from fewer random bits; by chance both, so a test compares their means."""
    if module.training and draws_fast(x):
        return Dropout.apply(x, module.p)
    return F.dropout(x, module.p, module.training)


def _propose_gate(module: nn.Module) -> list[Forward]:
    """down(act(gate(x)) up(x)) for a module with these three parts."""
    if not all(hasattr(module, part) for part in PARTS):
        return []

    def run(act: str, x: Tensor) -> Tensor:
        y = run_adapted(module, act, x) if is_adapted(module) else None
        if y is not None:
            return y
        return module.down_proj(Gate.apply(module.gate_proj(x), module.up_proj(x), act))

    return [partial(run, act) for act in ACTIVATIONS]


_UNITS: dict[str, Callable[[nn.Module], list[Forward]]] = {
    "rms-norm": _propose_norm,
    "gate": _propose_gate,
}


def _width_of(module: nn.Module) -> int:
    """The width of a unit's input."""
    weight = getattr(module, "weight", None)
    if weight is not None:
        return weight.shape[-1]
    return module.gate_proj.in_features


def _agrees(module: nn.Module, candidate: Forward, width: int) -> bool:
    """Whether both give the same answer and gradients on a random input."""
    place = _place_of(module)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 5, width, generator=generator).to(*place)
    weights = torch.randn(2, 5, width, generator=generator).to(*place)
    was_training = module.training
    module.eval()
    try:
        answers = [_answer(module, sample, weights), _answer(candidate, sample, weights)]
        expected, found = (_with_parameters(module, *answer) for answer in answers)
    except (RuntimeError, TypeError, AttributeError):
        return False
    finally:
        module.train(was_training)
    # gradients of float32 adapters come from the rounded numbers of a 16-bit model
    near = partial(_is_near, dtype=sample.dtype)
    return len(expected) == len(found) and all(map(near, found, expected))


def _place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a unit computes, and in which dtype; a unit of quantised layers has no parameter."""
    first = next(module.parameters(), None)
    if first is not None:
        return first.device, first.dtype
    return module.gate_proj.codes.device, module.gate_proj.dtype


def _answer(forward: Forward, sample: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = sample.clone().requires_grad_()
    y = forward(x)
    return x, y, (y * weights).sum()


def _with_parameters(module: nn.Module, x: Tensor, y: Tensor, total: Tensor) -> list[Tensor]:
    """The answer, and the gradients of the input and of everything that trains."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(total, [x, *trained])]


def _is_near(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> bool:
    tolerance = TOLERANCE.get(dtype or expected.dtype, 1e-5)
    found, expected = found.detach(), expected.detach()
    limit = tolerance * (float(expected.abs().max()) + 1e-12)
    return bool(torch.isfinite(found).all()) and float((found - expected).abs().max()) <= limit


def _patch_rotations(model: nn.Module) -> list[tuple[ModuleType, Any]]:
    """Puts the fast rotation into the family's module, where it agrees with the family's own."""
    homes = {sys.modules.get(type(module).__module__) for module in model.modules()}
    device = next(model.parameters()).device
    patched = []
    for home in homes:
        original = getattr(home, "apply_rotary_pos_emb", None)
        if (
            original is not None
            and original is not _rotate_both
            and _rotates_alike(original, device)
        ):
            home.apply_rotary_pos_emb = _rotate_both
            patched.append((home, original))
    return patched


def _rotate_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' call: q and k turned by the same angles."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)


def _rotates_alike(original: Callable[..., tuple[Tensor, Tensor]], device: torch.device) -> bool:
    """Whether a family's rotation is the usual one, for whole heads and for parts of them."""
    whole = [_turned(rotate, 8, device) for rotate in (original, _rotate_both)]
    part = [_turned(rotate, 4, device) for rotate in (original, _rotate_both)]
    if whole[0] is None or not all(map(_is_near, whole[1], whole[0])):
        return False
    return part[0] is None or all(map(_is_near, part[1], part[0]))


def _turned(
    rotate: Callable[..., tuple[Tensor, Tensor]], width: int, device: torch.device
) -> list[Tensor] | None:
    """Answers and gradients of a rotation of ``width`` of 8 coordinates; None if it cannot."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2)]
    q, k = (each.to(device).requires_grad_() for each in drawn)
    angles = torch.rand(1, 5, width // 2, generator=generator)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1).to(device) for f in (torch.cos, torch.sin))
    try:
        outs = rotate(q, k, cos, sin)
        total = sum((out * out.detach().cos()).sum() for out in outs)
        return [*outs, *torch.autograd.grad(total, [q, k])]
    except (RuntimeError, TypeError, ValueError):
        return None
