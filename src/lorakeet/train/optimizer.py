"""AdamW, with moments in 32 or 8 bits, here or in main memory, and its parameter groups.

Weight decay acts on matrices only; norms and biases are left alone.  LoRA+ gives
B a rate ``ratio`` times that of A (arXiv:2402.12354).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lorakeet.base.errors import RequestError
from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.recipe import TrainSettings
from lorakeet.train.adamw8bit import AdamW8bit

BETAS = (0.9, 0.999)
FULL_BETAS = (0.9, 0.98)  # a shorter memory of gradient squares, as small full runs want


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    train: TrainSettings,
    method: MethodSettings,
) -> torch.optim.Optimizer:
    """AdamW over every parameter that is trained.

    Each group carries ``rate_factor``: its rate over the schedule's.

    Raises:
        RequestError: nothing is trained.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            decay = train.weight_decay if parameter.ndim >= 2 else 0.0
            is_b = "lora_B" in name or "lora_embedding_B" in name
            factor = method.lora_plus_ratio if method.lora_plus_ratio and is_b else 1.0
            groups.setdefault((decay, factor), []).append(parameter)
    if not groups:
        raise RequestError("no parameter is trained. Check method.kind and method.targets.")
    members = [
        {"params": own, "weight_decay": decay, "rate_factor": factor}
        for (decay, factor), own in groups.items()
    ]
    betas = FULL_BETAS if method.kind == "full" else BETAS
    if train.optimizer != "adamw":
        return AdamW8bit(
            members, lr=train.learning_rate, betas=betas,
            is_8bit="8bit" in train.optimizer, is_paged="paged" in train.optimizer,
        )  # fmt: skip
    return torch.optim.AdamW(members, lr=train.learning_rate, betas=betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the schedule's rate, each group times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
