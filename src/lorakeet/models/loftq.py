"""LoftQ: an adapter that starts on what rounding took from its weight.

    Q = quant(W)        A0, B0 = SVD_r(W - dequant(Q))        W' = dequant(Q) + s B A

so that at step 0 the model is nearer to the full base than the quantised one is, and s B0 A0
is the best repair of rank r.  This is LoftQ with T = 1, which is PEFT's default as well.
More rounds, Q_t = quant(W - s B A), move Q a little nearer, but then every adapter needs a
quantised base of its own: no cache, no sharing among served adapters, no plain base to merge
into.  The base stays one file here, so T is 1 (docs/decisions/0013).

The factors are part of the adapter, which is plain LoRA on the base held in the same bits and
belongs to no other: on the full base its repair would be an error.

Source: arXiv:2310.08659, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakeet.adapters.experts import layer_names
from lorakeet.adapters.layer import LoraLayer
from lorakeet.adapters.settings import PISSA_FAST
from lorakeet.adapters.start import principal_factors
from lorakeet.base.errors import RequestError
from lorakeet.models.load import build_without_weights, resolve_base
from lorakeet.models.stored_form import is_prequantized
from lorakeet.models.weight_files import TensorFiles, find_renamed, find_sources, find_tensors
from lorakeet.quant.linear import QuantizedLinear


@torch.no_grad()
def start_on_errors(
    model: nn.Module, base: str, *, task: str, seed: int, name: str = "default"
) -> None:
    """Gives the factors of an adapter's quantised layers LoftQ's start, in place.

    Layers that hold their weight in full have no error and keep B = 0.

    Args:
        base: as in ``models.load``; its files hold the full weights.

    Raises:
        RequestError: the base's files are quantised, so the error is not known.

    Guarantees: ||W - (Q + s B A)|| < ||W - Q|| in every layer whose rounding lost something.

    Cost: one full weight and its sketched SVD at a time, O(out in r).
    """
    layers = {
        path: layer
        for path, layer in layer_names(model)
        if name in layer.ranks and isinstance(layer.base_layer, QuantizedLinear)
    }
    if not layers:
        return
    folder = resolve_base(base)
    if is_prequantized(folder):
        raise RequestError(
            f"method.start is loftq, but the files of {base} are quantised already, so nobody "
            "knows what rounding took. Take the full-precision base with quantization.kind, or "
            "method.start default."
        )
    empty = build_without_weights(base, task=task)
    files = find_tensors(folder)
    sources = find_renamed(empty, files) | find_sources(empty, files)
    reader = TensorFiles(files)
    for path, layer in layers.items():
        W = reader.read(sources[f"{path}.weight"])
        _start_layer(layer, name, W, seed)


def _start_layer(layer: LoraLayer, name: str, W: Tensor, seed: int) -> None:
    """A0 and B0 of one layer, and DoRA's m of the weight that they make."""
    W = (W.T if layer.base_layer.was_conv1d else W).to(layer.device, torch.float32)
    error = W - layer.base_matrix()
    # The sketch of PiSSA: errors have no gap among their singular values, and need none.
    starts = principal_factors(
        error, layer.ranks[name], layer.scales[name], start=PISSA_FAST, seed=seed
    )
    for factor, start in zip(layer.factors(name), starts, strict=True):
        factor.copy_(start)
    if name in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[name].copy_(layer.to_magnitude(layer.norm(name)))
