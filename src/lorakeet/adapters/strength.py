"""A knob for how strongly an attached adapter speaks.

    h = W0 x + f s B A x          f = 0 is the base exactly, f = 1 the adapter as trained

Values between dampen a specialist, values above 1 exaggerate it, negative ones push away
from what it learned (arXiv:2212.04089).  The knob turns the layers' scale and is not
written to files; ``adapters.combine`` with one adapter and a weight does that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from lorakeet.adapters.attach import merged_adapter, settings_of
from lorakeet.adapters.experts import layer_names
from lorakeet.adapters.layer import LoraLayer
from lorakeet.adapters.settings import NO_BIAS
from lorakeet.base.errors import RequestError


def set_strength(model: nn.Module, factor: float, *, name: str = "default") -> None:
    """Sets the factor f of an attached adapter, active or not; other adapters keep theirs.

    Args:
        factor: any finite number.

    Raises:
        RequestError: there is no such adapter, it is merged, the factor is not finite, or
            the adapter is more than s B A (saved modules, biases, DoRA), where no factor
            leads back to the base.
    """
    _check(model, factor, name)
    settings = settings_of(model)[name]
    for path, layer in _layers(model, name):
        layer.scales[name] = factor * settings.scale_of(path)


def strength_of(model: nn.Module, *, name: str = "default") -> float:
    """The factor f of an attached adapter; 1 as long as nobody has set it.

    Raises:
        RequestError: there is no such adapter.
    """
    if name not in settings_of(model):
        raise RequestError(f"no adapter '{name}' is attached, so it has no strength.")
    path, layer = next(_layers(model, name))
    return layer.scales[name] / settings_of(model)[name].scale_of(path)


def _check(model: nn.Module, factor: float, name: str) -> None:
    settings = settings_of(model).get(name)
    if settings is None:
        raise RequestError(f"no adapter '{name}' is attached, so it has no strength.")
    if not math.isfinite(factor):
        raise RequestError(f"the strength is {factor}; needed is a finite number, such as 0.5.")
    if merged_adapter(model) == name:
        raise RequestError(f"adapter '{name}' is merged into the base. Unmerge it first.")
    more = {
        "modules_to_save": settings.modules_to_save,
        "dora": settings.dora,
        "bias": settings.bias != NO_BIAS,
    }
    if found := [key for key, value in more.items() if value]:
        raise RequestError(
            f"adapter '{name}' trains more than s B A ({', '.join(found)}), which no factor turns "
            "back to the base. Use it as it was trained."
        )


def _layers(model: nn.Module, name: str) -> Iterator[tuple[str, LoraLayer]]:
    """The layers that hold an adapter, with their names."""
    return ((path, layer) for path, layer in layer_names(model) if name in layer.ranks)
