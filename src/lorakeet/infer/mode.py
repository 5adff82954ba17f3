"""A model for reading only: evaluation mode without gradients, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; each module's own mode restored after.

    ``no_grad`` and not ``inference_mode``: a buffer that the model remakes inside
    (rotary tables) must still be usable by a later training step.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in zip(modules, modes, strict=True):
            module.training = was_training
