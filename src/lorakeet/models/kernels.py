"""Who computes a unit: a Triton kernel for numbers on a GPU, else the torch reference.

Each kernel stands beside its reference: ``units_gpu`` beside ``units``, ``head_gpu`` beside
``score``.  This is the one place that chooses, so a unit asks once and computes either way.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from lorakeet.base.gpu_code import has_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_units(x: Tensor) -> ModuleType | None:
    """The kernels of the elementwise units for a tensor; None where the reference computes."""
    if not has_kernels(x):
        return None
    from lorakeet.models import units_gpu

    return units_gpu


def load_head(logits: Tensor) -> ModuleType | None:
    """The kernel of the loss for logits; None where the reference computes."""
    if not has_kernels(logits):
        return None
    from lorakeet.models import head_gpu

    return head_gpu


def has_kernels(x: Tensor) -> bool:
    """Whether Triton computes with a tensor: on a CUDA device, in 16 or 32 bits."""
    return x.is_cuda and x.dtype in DTYPES and has_triton()


def name_kernels(model: nn.Module) -> str:
    """What computes a model's fast units and its loss, ``triton`` or ``torch``."""
    return "triton" if has_kernels(next(model.parameters())) else "torch"
