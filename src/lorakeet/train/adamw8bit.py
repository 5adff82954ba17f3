"""AdamW whose two moments are kept in 8 bits: 2.03 bytes a parameter instead of 8.

    m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
    w = w - rate (decay w + mhat / (sqrt(vhat) + eps))
    mhat = m / (1 - b1^t),           vhat = v / (1 - b2^t)

Between two steps m and v are codes: each run of 256 neighbours is divided by its own
largest magnitude s, and each quotient rounded to the nearest of 256 levels,

    m_i ~ s * LEVELS[code_i]

so that one large value spoils 255 neighbours at most.  The levels are dynamic: their
distance grows with their size, from 1e-7 to 1, because the moments of one weight differ
by many powers of ten.  The update itself is made in float32, a piece at a time.

A v above 0 is never rounded to 0: it divides, and 0 would make a huge step of a small m.
The smallest level instead makes the step smaller, at most.

Tensors below 4096 elements keep float32 moments: they cost little and often matter most.

Paged moments lie in main memory, pinned where there is a GPU.  A step brings each piece of
them to the parameter's device, updates it there and writes it back, so the GPU holds one
piece at a time; the updates are the same in every bit.  Cost: both moments cross the bus
twice a step.  Tried without a GPU only.

Source: arXiv:2110.02861, sections 2.1 (block-wise), 2.2 (dynamic) and 3; paged states:
arXiv:2305.14314, section 3, there with CUDA's unified memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZE = 256
MIN_8BIT_SIZE = 4096
PIECE = 1 << 20  # elements that are expanded at once, 4 MiB each for m, v, g and w
EPS = 1e-8  # as torch's AdamW
_EXPONENTS = 7


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with block-wise 8-bit moments; all state is tensors, so a checkpoint is exact.

    Args:
        params: parameters or groups, as for torch's optimisers.
        lr: the rate.
        weight_decay: decoupled decay (arXiv:1711.05101).
        is_8bit: False keeps all moments in float32, which only pages need.
        is_paged: whether the moments lie in main memory.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        is_8bit: bool = True,
        is_paged: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": EPS,
                                  "weight_decay": weight_decay})  # fmt: skip
        self.is_8bit, self.is_paged = is_8bit, is_paged

    def place_state(self, value: Tensor, parameter: Tensor) -> Tensor:
        """A tensor of the state where this optimiser keeps it."""
        if not value.ndim:
            return value.cpu()  # the count of steps, read by the loop: no wait for the device
        if not self.is_paged:
            return value.to(parameter.device)
        return value.cpu().pin_memory() if parameter.is_cuda else value.cpu()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            made = _build_state(parameter.numel(), is_8bit=self.is_8bit)
            state.update({k: self.place_state(v, parameter) for k, v in made.items()})
        state["step"] += 1
        flat, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        for piece in _pieces(parameter.numel()):
            w, g = flat[piece].float(), gradient[piece].float()
            m, v = (_read(state, name, piece, w.device) for name in ("exp_avg", "exp_avg_sq"))
            _update(w, g, (m, v), int(state["step"]), group)
            flat[piece] = w.to(parameter.dtype)
            _write(state, "exp_avg", piece, m)
            _write(state, "exp_avg_sq", piece, v)


@cache
def build_levels(is_signed: bool) -> Tensor:
    """The 256 dynamic levels, rising; m is signed and v is not.

    A level is a power of ten, 1e-6 to 1, times a fraction from 0.1 to 1.  The larger the
    power, the more bits are left for the fraction: 2^i equal steps for 10^(i - 6), twice
    as many without a sign, and a level is the middle of its step.  0 and 1 are exact.

    >>> levels = build_levels(True)
    >>> len(levels), float(levels[127]), float(levels[-1])
    (256, 0.0, 1.0)
    """
    levels = [0.0, 1.0]
    for i in range(_EXPONENTS):
        steps = 2**i * (1 if is_signed else 2)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
        middles = (10.0 ** (i - _EXPONENTS + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += middles + [-middle for middle in middles] * is_signed
    return torch.tensor(sorted(levels), dtype=torch.float32)


def quantize_blocks(values: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest levels of a flat float32 tensor, and the scale of each block.

    Args:
        values: [N]; below zero only where ``is_signed``.

    Returns:
        codes uint8 [N], scales float32 [ceil(N / 256)]; a block of zeros has scale 0.

    Guarantees:
        |values - dequantize_blocks(result)| <= 0.0071 s, with s the scale of the block.
    """
    levels = build_levels(is_signed).to(values.device)
    edges = (levels[:-1] + levels[1:]) / 2
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scales = padded.abs().amax(dim=1)
    quotients = padded / torch.where(scales > 0, scales, 1)[:, None]
    codes = torch.bucketize(quotients, edges, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(values)], scales


def dequantize_blocks(codes: Tensor, scales: Tensor, *, is_signed: bool) -> Tensor:
    """s * LEVELS[code], float32 [N]."""
    values = build_levels(is_signed).to(codes.device)[codes.int()]
    return values * scales.repeat_interleave(BLOCK_SIZE)[: len(values)]


def _build_state(size: int, *, is_8bit: bool) -> dict[str, Tensor]:
    """Zero moments: float32 for a small tensor, else codes of level 0 and scales of 0."""
    state = {"step": torch.zeros((), dtype=torch.int64)}
    for name, is_signed in (("exp_avg", True), ("exp_avg_sq", False)):
        if size < MIN_8BIT_SIZE or not is_8bit:
            state[name] = torch.zeros(size)
        else:
            zero = int(torch.searchsorted(build_levels(is_signed), 0.0))
            state[f"{name}_codes"] = torch.full((size,), zero, dtype=torch.uint8)
            state[f"{name}_scales"] = torch.zeros(-(-size // BLOCK_SIZE))
    return state


def _pieces(size: int) -> Iterator[slice]:
    """Runs of whole blocks that cover a tensor."""
    return (slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE))


def _read(state: dict[str, Tensor], name: str, piece: slice, device: torch.device) -> Tensor:
    """A piece of a moment in float32, on the device where it is updated."""
    if name in state:
        return state[name][piece].to(device, non_blocking=True)
    codes, scales = state[f"{name}_codes"][piece], state[f"{name}_scales"][_blocks(piece)]
    return dequantize_blocks(
        codes.to(device, non_blocking=True), scales.to(device, non_blocking=True),
        is_signed=name == "exp_avg",
    )  # fmt: skip


def _write(state: dict[str, Tensor], name: str, piece: slice, values: Tensor) -> None:
    """A piece of a moment back to where it lies, in its codes or in float32."""
    if name in state:
        state[name][piece].copy_(values)  # nothing moves where it was changed in place
        return
    codes, scales = quantize_blocks(values, is_signed=name == "exp_avg")
    if name == "exp_avg_sq":
        codes = torch.where(values > 0, codes.clamp(min=1), codes)
    state[f"{name}_codes"][piece] = codes
    state[f"{name}_scales"][_blocks(piece)] = scales


def _blocks(piece: slice) -> slice:
    return slice(piece.start // BLOCK_SIZE, -(-piece.stop // BLOCK_SIZE))


def _update(
    w: Tensor, g: Tensor, moments: tuple[Tensor, Tensor], step: int, group: dict[str, Any]
) -> None:
    """AdamW's formula on float32 tensors, in place."""
    m, v = moments
    b1, b2 = group["betas"]
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    denominator = (v.sqrt() / math.sqrt(1 - b2**step)).add_(group["eps"])
    w.mul_(1 - group["lr"] * group["weight_decay"])
    w.addcdiv_(m, denominator, value=-group["lr"] / (1 - b1**step))
