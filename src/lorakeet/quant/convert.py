"""A model's linear layers made quantised ones in place, and plain ones again.

Which layers are chosen is said by their names; a whole model that does not fit into
memory is quantised while it is read (``models.quantized``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorakeet.quant.int8 import quantize_int8
from lorakeet.quant.linear import Quantized, QuantizedLinear, Scratch
from lorakeet.quant.nf4 import quantize_blocks


@dataclass(frozen=True, kw_only=True)
class QuantizedForm:
    """How a weight is rounded.

    Args:
        kind: ``nf4``, ``fp4`` or ``int8``.
        block_size: K of the 4-bit kinds.
        double: whether their scales are rounded to 8 bits too.
    """

    kind: str = "nf4"
    block_size: int = 64
    double: bool = True


def quantize_weight(weight: Tensor, form: QuantizedForm) -> Quantized:
    """A matrix [out, in] in a form; read, never changed.

    Raises:
        ShapeError, NumericsError, RequestError: as ``quantize_blocks`` and ``quantize_int8``.
    """
    if form.kind == "int8":
        return quantize_int8(weight)
    return quantize_blocks(weight, block_size=form.block_size, kind=form.kind, double=form.double)


def quantize_model(model: nn.Module, names: Iterable[str], form: QuantizedForm) -> None:
    """Puts quantised layers in the place of linear layers and Conv1D, in place.

    Args:
        names: full names of the layers.

    Raises:
        ShapeError, NumericsError, RequestError: as ``quantize_weight``.
    """
    scratch = Scratch()
    for name in names:
        layer = model.get_submodule(name)
        is_conv1d = type(layer).__name__ == "Conv1D"
        weight = layer.weight.detach().T.contiguous() if is_conv1d else layer.weight
        new = QuantizedLinear(
            quantize_weight(weight, form), layer.bias, scratch=scratch, was_conv1d=is_conv1d
        )
        replace_module(model, name, new.train(layer.training))


def dequantize_model(model: nn.Module) -> None:
    """Puts plain layers with the dequantised weights in the place of all quantised ones.

    Cost: the memory of the plain model.
    """
    from transformers.pytorch_utils import Conv1D

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    for name, layer in layers:
        sizes = layer.in_features, layer.out_features
        with torch.device("meta"):
            plain = Conv1D(*sizes[::-1]) if layer.was_conv1d else nn.Linear(*sizes)
        weight = layer.weight.T.contiguous() if layer.was_conv1d else layer.weight
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        replace_module(model, name, plain.train(layer.training))


def count_weights(model: nn.Module) -> int:
    """Parameters of a model, those in 4 and 8 bits included."""
    hidden = [m.num_weights for m in model.modules() if isinstance(m, QuantizedLinear)]
    return sum(p.numel() for p in model.parameters()) + sum(hidden)


def with_dtype(weight: Quantized, dtype: torch.dtype) -> Quantized:
    """The same weight that reads as another dtype."""
    return replace(weight, dtype=dtype)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a place of a model."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
