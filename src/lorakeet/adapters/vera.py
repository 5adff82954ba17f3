"""VeRA: random A and B that all layers share and nobody trains, and two trained vectors a layer.

    h = W0 x + diag(b) B diag(d) A x        A: r x max in,  B: max out x r,  a layer takes
                                            the first columns of A and the first rows of B

d starts at 0.1 and b at zero, so step 0 is the base.  A layer trains r + out numbers instead of
r (in + out), and r can be large (the paper: 256 to 1024) and above the sizes of a matrix.  There
is no alpha.  The rates are about ten times LoRA's.

diag(b) B and diag(d) A are the B and A of a plain LoRA of scale 1, and everything else here
(merging, answers) sees them as that.

Source: arXiv:2310.11454, section 3.  Files and the draw of A and B are PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

START_D = 0.1  # the paper's d_init, and PEFT's
FILE_NAMES = ("base_model.vera_A", "base_model.vera_B")


def draw_projections(seed: int, r: int, num_in: int, num_out: int) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]), Kaiming-uniform as PEFT draws them from the same key.

    >>> A, B = draw_projections(0, 2, 3, 4)
    >>> A.shape, B.shape, bool(A.abs().max() <= 2**0.5)
    (torch.Size([2, 3]), torch.Size([4, 2]), True)
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (r, num_in), (num_out, r)
    A, B = (
        torch.empty(shape).uniform_(*_bounds(shape[1]), generator=generator) for shape in shapes
    )
    return A, B


def share_projections(layers: Sequence[Any], name: str, seed: int) -> None:
    """Gives the ``LoraLayer`` of an adapter one A and one B, as large as the largest needs."""
    sizes = [layer.sizes for layer in layers]
    num_in, num_out = (max(own) for own in zip(*sizes, strict=True))
    drawn = draw_projections(seed, layers[0].ranks[name], num_in, num_out)
    A, B = (nn.Parameter(each.to(layers[0].device), requires_grad=False) for each in drawn)
    for layer in layers:
        layer.vera_A[name], layer.vera_B[name] = A, B


def start_vectors(layer: Any, name: str, r: int, num_out: int) -> None:
    """d and b of a new adapter, float32."""
    layer.vera_lambda_d[name] = nn.Parameter(torch.full((r,), START_D, device=layer.device))
    layer.vera_lambda_b[name] = nn.Parameter(torch.zeros(num_out, device=layer.device))


def scaled_projections(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """(diag(d) A [r, in], diag(b) B [out, r]) of a layer."""
    num_in, num_out = layer.sizes
    A = layer.vera_A[name][:, :num_in] * layer.vera_lambda_d[name][:, None]
    return A, layer.vera_B[name][:num_out] * layer.vera_lambda_b[name][:, None]


def shared_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """A and B under the names of the file; empty for an adapter of another kind."""
    for module in model.modules():
        if name in getattr(module, "vera_A", ()):
            pair = module.vera_A[name], module.vera_B[name]
            return dict(zip(FILE_NAMES, pair, strict=True))
    return {}


def with_projections(
    model: nn.Module, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A file's tensors; those of ``save_projection: false`` get A and B drawn from its key."""
    drawn = {} if config.get("save_projection", True) else shared_tensors(model, name)
    return {**drawn, **tensors}


def _bounds(fan_in: int) -> tuple[float, float]:
    """Kaiming-uniform with the gain sqrt(2)."""
    bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(fan_in)
    return -bound, bound
