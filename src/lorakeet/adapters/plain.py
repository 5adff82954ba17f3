"""Every variant as the plain LoRA that is equal, which is what files hold.

    PiSSA     s (B A - B0 A0)   =  s [B, -B0] [A; A0]          rank 2 r, alpha so that s stays
    AdaLoRA   s P Lambda Q      =  s P' (Lambda Q)'            only the rows with Lambda_i != 0

So any reader of LoRA loads them on the original base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lorakeet.adapters.attach import settings_of
from lorakeet.adapters.experts import layer_names
from lorakeet.adapters.layer import LoraLayer
from lorakeet.adapters.settings import DEFAULT_START, PISSA_STARTS, Lora
from lorakeet.base.errors import FileFormatError, RequestError

PREFIX = "base_model.model."
_EPSILON = 1e-5  # PEFT divides AdaLoRA's alpha by r + 1e-5


def adapted_layers(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    """The layers that an adapter changes at a rank above 0, by path."""
    return {
        path: layer
        for path, layer in layer_names(model)
        if name in layer.ranks and layer.plain_rank(name)
    }


def to_plain_settings(model: nn.Module, name: str) -> Lora:
    """The settings of the plain LoRA.

    Raises:
        RequestError: every singular value of an AdaLoRA adapter is 0, as before training.
    """
    settings = settings_of(model)[name]
    if settings.adalora is not None:
        layers = adapted_layers(model, name)
        if not layers:
            raise RequestError(
                f"adapter '{name}': every singular value is 0, so there is nothing to write. "
                "Train it first."
            )
        ranks = {path: layer.plain_rank(name) for path, layer in layers.items()}
        alphas = {path: layer.scales[name] * ranks[path] for path, layer in layers.items()}
        return replace(settings, adalora=None, rank_pattern=ranks, alpha_pattern=alphas)
    if settings.start in PISSA_STARTS:
        more = math.sqrt(2) if settings.rslora else 2
        return replace(
            settings, start=DEFAULT_START, rank=2 * settings.rank, alpha=more * settings.alpha,
            rank_pattern={key: 2 * r for key, r in settings.rank_pattern.items()},
            alpha_pattern={key: more * a for key, a in settings.alpha_pattern.items()},
        )  # fmt: skip
    return settings


def to_plain_tensors(named: Mapping[str, Tensor], model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors by their names in a file, with the factors of the plain LoRA."""
    plain = {key: tensor for key, tensor in named.items() if not key.endswith(".lora_E")}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.ranks or layer.is_plain(name):
            continue
        kinds = (layer.a_name, layer.b_name)
        for kind, factor in zip(kinds, layer.plain_factors(name), strict=True):
            key = next(k for k in named if k.startswith(f"{PREFIX}{path}.{kind}"))
            sizes = named[key].shape  # a convolution's kernels keep their dimensions
            shape = (-1, *sizes[1:]) if kind == layer.a_name else (sizes[0], -1, *sizes[2:])
            plain[key] = factor.reshape(shape) if factor.numel() else factor
            if not factor.numel():
                del plain[key]
    return plain


def read_adalora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's AdaLoRA file as the file of the plain LoRA that is equal.

    Raises:
        FileFormatError: a factor is missing, or the ranks of a module differ.
    """
    values = {key for key in tensors if key.endswith(".lora_E")}
    plain, ranks = dict(tensors), {}
    for key in sorted(values):
        path = key.removesuffix(".lora_E")
        E = plain.pop(key)
        A, B = plain.pop(f"{path}.lora_A", None), plain.pop(f"{path}.lora_B", None)
        if A is None or B is None or not len(E) == len(A) == B.shape[-1]:
            raise FileFormatError(f"{path}: lora_A, lora_E and lora_B are not of one rank.")
        if len(E):
            ranks[path.removeprefix(PREFIX)] = len(E)
            plain[f"{path}.lora_A.weight"] = (A * E).contiguous()
            plain[f"{path}.lora_B.weight"] = B
    try:
        r, alpha = config["init_r"], config["lora_alpha"]
        scale = (alpha if alpha > 0 else r) / (r + _EPSILON)
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"init_r or lora_alpha is missing or no number: {error}") from error
    known = {
        **config, "peft_type": "LORA", "r": r, "lora_alpha": scale * r,
        "target_modules": sorted(ranks), "exclude_modules": None, "rank_pattern": ranks,
        "alpha_pattern": {path: scale * own for path, own in ranks.items()}, "use_rslora": False,
        "layers_to_transform": None,
    }  # fmt: skip
    return known, plain
