"""A module of ``modules_to_save``: the original, and a copy per adapter trained in full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SavedModule(nn.Module):
    """A module of ``modules_to_save``: the original, and a trained copy per adapter.

    Copies are float32, as they are trained.  Beside a base of another dtype the input is
    cast to float32 and the answer back.  While one is merged, ``original_module`` is the
    merged module and ``kept`` holds the true original (in a tuple, so that it is no child).
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.merged: str | None = None
        self.kept: tuple[nn.Module, ...] = ()

    @property
    def names(self) -> set[str]:
        """The adapters that have a copy."""
        return set(self.modules_to_save.keys())

    @property
    def weight(self) -> Tensor:
        """The weight in use, for code that reads it."""
        return self.chosen.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias in use."""
        return getattr(self.chosen, "bias", None)

    @property
    def chosen(self) -> nn.Module:
        """The copy of the active adapter, or the original (or merged) module."""
        if self.active is None or self.merged is not None:
            return self.original_module
        return self.modules_to_save[self.active]

    def remove(self, name: str) -> None:
        """Forgets an adapter's copy; a merged one stays in place of the original for good."""
        if self.merged == name:
            self.merged, self.kept = None, ()
        if self.active == name:
            self.active = None
        del self.modules_to_save[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module in use answers, in the dtype of the base."""
        chosen, base = self.chosen, _dtype_of(self.original_module)
        own = _dtype_of(chosen)
        if own == base or own is None:
            return chosen(*args, **kwargs)
        args = tuple(_to_dtype(each, own) for each in args)
        kwargs = {key: _to_dtype(each, own) for key, each in kwargs.items()}
        return _to_dtype(chosen(*args, **kwargs), base)


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's first parameter."""
    return next((parameter.dtype for parameter in module.parameters()), None)


def _to_dtype(value: Any, dtype: torch.dtype | None) -> Any:
    """A floating tensor in another dtype; anything else as it is."""
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_floating else value
