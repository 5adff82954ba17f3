"""What rounding each layer alone costs in loss, found in one pass forward and back a sample.

Rounding moves the weight W of a layer by D = W' - W, and the loss of a sample n by g_n . D,
with g_n its gradient.  The mean loss rises by the second-order term, whose curvature is the
Fisher information, the mean of g g^T over samples:

    cost = 1/2 D^T F D ~ 1/2 sum_n (g_n . D)^2 / number of targets           nats a token

Replacing the layers one by one instead takes a pass for each layer and form over all
samples, and its differences of losses drown in noise where rounding hardly hurts.  This
takes a pass over the samples, whatever the number of layers and forms.

Cost: the plain model, all forms of all layers beside it, and one gradient [out, in].
Source: arXiv:1412.1193 (the empirical Fisher); arXiv:1909.05840 ranks layers by second-order
terms for mixed widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.adapters.layer import is_conv1d
from lorakeet.base.errors import NumericsError
from lorakeet.quant.convert import QuantizedForm, quantize_weight, replace_module
from lorakeet.quant.linear import QuantizedLinear, Scratch, expand

Score = Callable[[nn.Module, Any], tuple[Tensor, int]]


class Layer:
    """A linear layer with its rounded forms, and what each form costs.

    Args:
        forms: name of a form -> the form.
    """

    def __init__(self, module: nn.Module, forms: Mapping[str, QuantizedForm]) -> None:
        self.module = module
        self.is_turned = is_conv1d(module)
        self.forms = {name: quantize_weight(self.weight, form) for name, form in forms.items()}
        self.change = dict.fromkeys(forms, 0.0)  # g . D of the sample at hand
        self.cost = dict.fromkeys(forms, 0.0)

    @property
    def weight(self) -> Tensor:
        """W as [out, in]."""
        weight = self.module.weight.detach()
        return weight.T.contiguous() if self.is_turned else weight

    def note(self, x: Tensor, dy: Tensor) -> None:
        """Adds what one call of the layer brings to g . D."""
        W = self.weight.float()
        g_OI = dy.reshape(-1, W.shape[0]).float().T @ x.reshape(-1, W.shape[1]).float()
        for name, weight in self.forms.items():
            moved = expand(weight, torch.float32).sub_(W)
            self.change[name] += float(torch.dot(g_OI.view(-1), moved.view(-1)))

    def close_sample(self) -> None:
        """Adds 1/2 (g . D)^2 of the sample to the costs."""
        for name, change in self.change.items():
            self.cost[name] += change**2 / 2
        self.change = dict.fromkeys(self.forms, 0.0)


def measure_sensitivity(
    model: nn.Module,
    samples: Iterable[Any],
    score: Score,
    forms: Mapping[str, Mapping[str, QuantizedForm]],
) -> dict[str, Layer]:
    """Each layer with the cost of each of its forms, in nats a target.

    Args:
        model: in full precision and evaluation mode; its parameters are frozen.
        samples: one at a time, as a gradient of several together cannot be told apart.
        score: the summed loss of a sample and its targets.
        forms: layer -> name of a form -> the form.

    Raises:
        ShapeError, NumericsError: as ``quantize_weight``.
    """
    layers = {}
    for name, own in forms.items():
        try:
            layers[name] = Layer(model.get_submodule(name), own)
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error
    model.requires_grad_(False)
    handles = [_watch(layer) for layer in layers.values()]
    handles.append(model.get_input_embeddings().register_forward_hook(_begin_graph))
    total = 0
    try:
        with torch.enable_grad():
            for sample in samples:
                loss, count = score(model, sample)
                loss.backward()
                total += count
                for layer in layers.values():
                    layer.close_sample()
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers.values():
        layer.cost = {name: cost / total for name, cost in layer.cost.items()}
    return layers


@contextmanager
def rounded(
    model: nn.Module, layers: Mapping[str, Layer], chosen: Mapping[str, str]
) -> Iterator[None]:
    """The model with its layers in chosen forms; afterwards it has its plain layers again.

    Args:
        chosen: layer -> name of a form; a name that the layer has not leaves it plain.
    """
    scratch = Scratch()
    held = {name: layer for name, layer in layers.items() if chosen[name] in layer.forms}
    for name, layer in held.items():
        form = layer.forms[chosen[name]]
        new = QuantizedLinear(form, layer.module.bias, scratch=scratch, was_conv1d=layer.is_turned)
        replace_module(model, name, new.eval())
    try:
        yield
    finally:
        for name, layer in held.items():
            replace_module(model, name, layer.module)


def _watch(layer: Layer) -> Any:
    """Notes the input and the output's gradient of each call of a layer."""

    def forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda dy: layer.note(x, dy))

    return layer.module.register_forward_hook(forward)


def _begin_graph(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Makes gradients flow although all parameters are frozen."""
    return output.requires_grad_(True)
