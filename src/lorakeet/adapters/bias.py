"""Biases that are trained with an adapter; every adapter has its own, the base keeps its.

    none        no bias is trained
    lora_only   those of the adapted layers
    all         every bias of the model, norms included

Only the copy gets a gradient: h = f(x; W0, b') with b' = b at the start.  Source: the
option ``bias`` of PEFT; training biases alone is BitFit, arXiv:2106.10199.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lorakeet.adapters.saved import SavedModule
from lorakeet.adapters.settings import ALL_BIASES, NO_BIAS
from lorakeet.base.errors import RequestError


class BiasLayer(nn.Module):
    """A module that LoRA cannot adapt, such as a norm, with a trained bias per adapter."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trained_bias = nn.ParameterDict()
        self.active: str | None = None
        self.merged: str | None = None
        self.kept_bias: Tensor | None = None

    @property
    def names(self) -> set[str]:
        """The adapters that hold something here."""
        return set(self.trained_bias.keys())

    @property
    def weight(self) -> Tensor:
        """The base layer's, for code that reads it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        """The bias in use."""
        return bias_in_use(self)

    def remove(self, name: str) -> None:
        """Forgets an adapter's bias; a merged one stays in the base for good."""
        if self.merged == name:
            self.merged, self.kept_bias = None, None
        if self.active == name:
            self.active = None
        del self.trained_bias[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer answers with the bias in use."""
        return call_base(self, args, kwargs)


def call_base(layer: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What a wrapper's base layer answers with the bias in use."""
    base = layer.base_layer
    if layer.merged is not None or layer.active not in layer.trained_bias:
        return base(*args, **kwargs)
    return functional_call(base, {"bias": bias_in_use(layer)}, args, dict(kwargs))


def bias_in_use(layer: nn.Module) -> Tensor | None:
    """The active adapter's bias in the base's dtype, or the base's own."""
    own = getattr(layer.base_layer, "bias", None)
    if layer.merged is not None or layer.active not in layer.trained_bias:
        return own
    return layer.trained_bias[layer.active].to(own.dtype)


def add_bias(layer: nn.Module, name: str) -> None:
    """A trained copy of the base layer's bias, float32."""
    layer.trained_bias[name] = nn.Parameter(layer.base_layer.bias.detach().float().clone())


def select_biased(model: nn.Module, kind: str, targets: list[str], saved: list[str]) -> list[str]:
    """The modules whose bias an adapter trains; modules trained in full are passed over.

    Raises:
        RequestError: a bias belongs to a module with others inside, which cannot be wrapped.
    """
    if kind == NO_BIAS:
        return []
    found, odd = [], []
    for path, module in _bare_modules(model):
        has_bias = isinstance(getattr(module, "_parameters", {}).get("bias"), nn.Parameter)
        inside = any(path == each or path.startswith(f"{each}.") for each in saved)
        if has_bias and not inside and (kind == ALL_BIASES or path in targets):
            (odd if any(module.children()) else found).append(path)
    if odd:
        raise RequestError(
            f"bias: all would train the bias of {odd[0]}, which has modules inside and cannot be "
            "wrapped. Choose bias: lora_only, or name it in modules_to_save."
        )
    return found


def _bare_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules by the names that they have without wrappers, and without what wrappers hold."""
    found, skipped = [], []
    for path, module in model.named_modules():
        if any(path.startswith(f"{each}.") for each in skipped):
            continue
        if hasattr(module, "trained_bias"):
            found.append((path, module.base_layer))
            skipped.append(path)
        elif isinstance(module, SavedModule):
            found.append((path, module.original_module))
            skipped.append(path)
        else:
            found.append((path, module))
    return found
