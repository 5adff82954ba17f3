"""The elementwise units of ``models.units`` for a GPU, in Triton.

A GPU waits for its memory here, so each kernel reads its inputs once and writes its answer
once; everything between is float32 in registers, whatever the inputs are.

    RMS norm    a program takes a row; backward strides over rows to add up dw
    gate        a program takes 1024 numbers
    rotation    a program takes 16 rows (a token of a head) with both halves of their width

Cost in bytes moved, of w bytes a number: norm 2 w forward and 3 w backward, gate 3 w and 5 w,
rotation 2 w each way.

Legend: N rows, D width, W rotated width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 1024  # numbers that a program of the gate takes
ROWS = 16  # that a program of the rotation takes
PROGRAMS = 512  # of the norm's backward, at most; each leaves one row of dw
MAX_WIDTH = 65536  # a row of the norm lies in one program's registers
ROOT_HALF = tl.constexpr(0.7071067811865476)  # sqrt(1/2)
ROOT_TAU = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
ROOT_TWO_PI = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)  # of GELU's approximation by tanh (arXiv:1606.08415, section 2)


@triton.jit
def norm_kernel(x, w, y, r, width, eps, block: tl.constexpr):
    """y = w x r with r = 1 / sqrt(mean(x^2) + eps), for one row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, block)
    is_inside = d < width
    values = tl.load(x + row * width + d, mask=is_inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    weight = tl.load(w + d, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(r + row, scale)
    answer = (values * scale * weight).to(y.dtype.element_ty)
    tl.store(y + row * width + d, answer, mask=is_inside)


@triton.jit
def norm_backward_kernel(
    x, w, r, dy, dx, dw, num_rows, width, block: tl.constexpr, wants_dw: tl.constexpr
):
    """dx = r (t - n mean(t n)) with n = x r and t = dy w; this program's part of dw = sum dy n."""
    d = tl.arange(0, block)
    is_inside = d < width
    weight = tl.load(w + d, mask=is_inside, other=0.0).to(tl.float32)
    total = tl.zeros((block,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for row in range(first, num_rows, tl.num_programs(0)):
        place = row * width + d
        scale = tl.load(r + row)
        n = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32) * scale
        slope = tl.load(dy + place, mask=is_inside, other=0.0).to(tl.float32)
        if wants_dw:
            total += slope * n
        t = slope * weight
        answer = scale * (t - n * (tl.sum(t * n, axis=0) / width))
        tl.store(dx + place, answer.to(dx.dtype.element_ty), mask=is_inside)
    if wants_dw:
        tl.store(dw + tl.program_id(0) * width + d, total, mask=is_inside)


@triton.jit
def activate(g, act: tl.constexpr):
    """act(g) and act'(g) in float32."""
    if act == "silu":
        s = tl.sigmoid(g)
        value = g * s
        slope = s * (1 + g * (1 - s))
    elif act == "gelu":
        s = 0.5 * (1 + tl.erf(g * ROOT_HALF))
        value = g * s
        slope = s + g * ROOT_TAU * tl.exp(-0.5 * g * g)
    else:
        inner = ROOT_TWO_PI * (g + CUBIC * g * g * g)
        bend = 2 * tl.sigmoid(2 * inner) - 1  # tanh
        value = 0.5 * g * (1 + bend)
        rise = ROOT_TWO_PI * (1 + 3 * CUBIC * g * g)
        slope = 0.5 * (1 + bend) + 0.5 * g * (1 - bend * bend) * rise
    return value, slope


@triton.jit
def gate_kernel(g, u, y, num, act: tl.constexpr, size: tl.constexpr):
    """y = act(g) u."""
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    is_inside = at < num
    value, _ = activate(tl.load(g + at, mask=is_inside, other=0.0).to(tl.float32), act)
    up = tl.load(u + at, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(y + at, (value * up).to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def gate_backward_kernel(g, u, dy, dg, du, num, act: tl.constexpr, size: tl.constexpr):
    """du = dy act(g), dg = dy u act'(g)."""
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    is_inside = at < num
    value, slope = activate(tl.load(g + at, mask=is_inside, other=0.0).to(tl.float32), act)
    up = tl.load(u + at, mask=is_inside, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(du + at, (d * value).to(du.dtype.element_ty), mask=is_inside)
    tl.store(dg + at, (d * up * slope).to(dg.dtype.element_ty), mask=is_inside)


@triton.jit
def rotate_kernel(
    x, cos, sin, y, num_rows, size_1, size_2, width, x_0, x_1, x_2, y_0, y_1, y_2,
    c_0, c_1, c_2, s_0, s_1, s_2, half, sign: tl.constexpr, rows: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """(x1, x2) -> (x1 c1 - x2 s1, x2 c2 + x1 s2), sin times ``sign``; the rest of a row as it is.

    Sizes and strides are those of three leading dimensions; the last has stride 1.
    """
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    i_2, rest = row % size_2, row // size_2
    i_1, i_0 = rest % size_1, rest // size_1
    from_x = (i_0 * x_0 + i_1 * x_1 + i_2 * x_2)[:, None]
    to_y = (i_0 * y_0 + i_1 * y_1 + i_2 * y_2)[:, None]
    from_c = (i_0 * c_0 + i_1 * c_1 + i_2 * c_2)[:, None]
    from_s = (i_0 * s_0 + i_1 * s_1 + i_2 * s_2)[:, None]
    d = tl.arange(0, block)[None, :]
    is_row = (row < num_rows)[:, None]
    is_inside = is_row & (d < half)
    first = tl.load(x + from_x + d, mask=is_inside, other=0.0).to(tl.float32)
    second = tl.load(x + from_x + half + d, mask=is_inside, other=0.0).to(tl.float32)
    c1 = tl.load(cos + from_c + d, mask=is_inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + from_c + half + d, mask=is_inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + from_s + d, mask=is_inside, other=0.0).to(tl.float32) * sign
    s2 = tl.load(sin + from_s + half + d, mask=is_inside, other=0.0).to(tl.float32) * sign
    turned = (first * c1 - second * s1).to(y.dtype.element_ty)
    tl.store(y + to_y + d, turned, mask=is_inside)
    turned = (second * c2 + first * s2).to(y.dtype.element_ty)
    tl.store(y + to_y + half + d, turned, mask=is_inside)
    for start in range(2 * half, width, block):
        is_rest = is_row & (start + d < width)
        kept = tl.load(x + from_x + start + d, mask=is_rest, other=0.0)
        tl.store(y + to_y + start + d, kept, mask=is_rest)


def norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm's answer in the dtype of x, and r, float32 [N]."""
    x, w = x.contiguous(), w.contiguous()
    width = x.shape[-1]
    y, r = torch.empty_like(x), torch.empty(x.numel() // width, device=x.device)
    block = triton.next_power_of_2(width)
    norm_kernel[(len(r),)](x, w, y, r, width, eps, block=block, num_warps=_count_warps(block))
    return y, r


def norm_backward(
    x: Tensor, w: Tensor, r: Tensor, dy: Tensor, *, wants_dw: bool
) -> tuple[Tensor, Tensor | None]:
    """dx in the dtype of x, and dw in float32 when it is wanted."""
    x, w, dy = x.contiguous(), w.contiguous(), dy.contiguous()
    num_rows, width = len(r), x.shape[-1]
    programs, block = min(num_rows, PROGRAMS), triton.next_power_of_2(width)
    dx = torch.empty_like(x)
    parts = torch.empty(programs if wants_dw else 1, width, device=x.device)
    norm_backward_kernel[(programs,)](
        x, w, r, dy, dx, parts, num_rows, width, block=block, wants_dw=wants_dw,
        num_warps=_count_warps(block),
    )  # fmt: skip
    return dx, parts.sum(0) if wants_dw else None


def gate(g: Tensor, u: Tensor, act: str) -> Tensor:
    """act(g) u, in the dtype of g."""
    g, u = g.contiguous(), u.contiguous()
    y = torch.empty_like(g)
    gate_kernel[(triton.cdiv(g.numel(), SIZE),)](g, u, y, g.numel(), act=act, size=SIZE)
    return y


def gate_backward(g: Tensor, u: Tensor, dy: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """(dg, du), each in the dtype of its input."""
    g, u, dy = g.contiguous(), u.contiguous(), dy.contiguous()
    dg, du = torch.empty_like(g), torch.empty_like(u)
    gate_backward_kernel[(triton.cdiv(g.numel(), SIZE),)](
        g, u, dy, dg, du, g.numel(), act=act, size=SIZE
    )
    return dg, du


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, is_backward: bool = False) -> Tensor:
    """x turned by its angles, or turned back.

    Args:
        x: [*, *, *, D] of any strides; the answer has the same.
        cos, sin: what broadcasts to [*, *, *, W], W at most D.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    width, turned = x.shape[-1], cos.shape[-1]
    shape = (*x.shape[:-1], turned)
    cos, sin = (_as_rows(angles).expand(shape) for angles in (cos, sin))
    y = torch.empty_like(x)
    num_rows = x.numel() // width
    rotate_kernel[(triton.cdiv(num_rows, ROWS),)](
        x, cos, sin, y, num_rows, x.shape[1], x.shape[2], width, *x.stride()[:3],
        *y.stride()[:3], *cos.stride()[:3], *sin.stride()[:3], turned // 2,
        sign=-1.0 if is_backward else 1.0, rows=ROWS, block=triton.next_power_of_2(turned // 2),
    )  # fmt: skip
    return y


def _as_rows(angles: Tensor) -> Tensor:
    """Angles whose last dimension has stride 1."""
    return angles if angles.stride(-1) == 1 else angles.contiguous()


def _count_warps(block: int) -> int:
    """Warps of a program that holds a row: 256 numbers a warp, 4 to 16 warps."""
    return min(16, max(4, block // 256))
