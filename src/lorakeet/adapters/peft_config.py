"""The settings of an adapter as PEFT's ``adapter_config.json``, in both directions.

An option that changes the mathematics in a way that is not known here refuses the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lorakeet.adapters.experts import LoraExperts
from lorakeet.adapters.layer import LoraLayer, is_conv1d
from lorakeet.adapters.plain import adapted_layers, to_plain_settings
from lorakeet.adapters.settings import NO_BIAS, Lora
from lorakeet.adapters.vera import START_D
from lorakeet.base.errors import FileFormatError, RequestError

CONFIG, VERA = "adapter_config.json", "VERA"
_UNREADABLE = (
    "use_qalora", "lora_bias", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "use_bdlora",
    "arrow_config", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip


def to_peft_config(model: nn.Module, name: str, base: str) -> dict[str, Any]:
    """The settings under PEFT's keys, with the targets listed by full name."""
    settings = to_plain_settings(model, name)
    layers = adapted_layers(model, name)
    stacked = sorted(path for path, each in layers.items() if isinstance(each, LoraExperts))
    kind = type(model).__name__
    task_type = "CAUSAL_LM" if "CausalLM" in kind or "LMHead" in kind else None
    task_type = "SEQ_CLS" if "ForSequenceClassification" in kind else task_type
    shared = {"task_type": task_type, "base_model_name_or_path": base, "r": settings.rank}
    fan_in_fan_out = any(
        is_conv1d(each.base_layer) or getattr(each.base_layer, "was_conv1d", False)
        for each in layers.values()
    )
    if settings.vera is not None:
        return {**shared, **_to_vera(settings, layers), "fan_in_fan_out": fan_in_fan_out}
    return {
        "peft_type": "LORA",
        **shared,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(layers.keys() - stacked),
        "target_parameters": stacked or None,
        "exclude_modules": _to_json(settings.exclude),
        "layers_to_transform": _to_json(settings.layers),
        "layers_pattern": _to_json(settings.layers_pattern),
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "modules_to_save": list(settings.modules_to_save) or None,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": settings.bias,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _to_vera(settings: Lora, layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """What PEFT's VeRA calls otherwise than its LoRA, or has alone."""
    return {
        "peft_type": VERA,
        "target_modules": sorted(layers),
        "projection_prng_key": settings.vera,
        "save_projection": True,
        "vera_dropout": settings.dropout,
        "d_initial": START_D,
        "modules_to_save": list(settings.modules_to_save) or None,
        "bias": settings.bias,
        "init_weights": True,
        "inference_mode": True,
    }


def from_peft_config(config: Mapping[str, Any], folder: Path) -> Lora:
    """The settings behind PEFT's keys.

    Raises:
        FileFormatError: another kind of adapter, or an option that changes the
            mathematics in a way that is not known here.
    """
    problems = []
    is_vera = config.get("peft_type") == VERA
    if config.get("peft_type") != "LORA" and not is_vera:
        problems.append(f"peft_type is {config.get('peft_type')}, needed is LORA, ADALORA or VERA")
    off = (None, [], {}, "")
    problems += [k for k in _UNREADABLE if config.get(k) is not False and config.get(k) not in off]
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "eva"):
        problems.append(f"a changed base (init_lora_weights: {config['init_lora_weights']})")
    if problems:
        raise FileFormatError(f"{folder}/{CONFIG}: cannot be used here: {'; '.join(problems)}.")
    targets, exclude = config.get("target_modules") or (), config.get("exclude_modules") or ()
    saved = tuple(config.get("modules_to_save") or ())
    if stacked := config.get("target_parameters"):
        targets = _add_names(targets, stacked)
    if not isinstance(targets, str):  # in PEFT a module that is saved is never adapted
        targets = tuple(name for name in targets if name not in saved)
    own = {"alpha": config.get("lora_alpha"), "dropout": config.get("lora_dropout") or 0.0}
    if is_vera:
        dropout = config.get("vera_dropout") or 0.0
        own = {"dropout": dropout, "vera": config.get("projection_prng_key")}
    try:
        return Lora(
            rank=config["r"], **own, targets=targets, modules_to_save=saved,
            exclude=exclude if isinstance(exclude, str) else tuple(exclude),
            layers=_to_tuple(config.get("layers_to_transform")),
            layers_pattern=_to_tuple(config.get("layers_pattern")),
            bias=config.get("bias") or NO_BIAS,
            rslora=bool(config.get("use_rslora")), dora=bool(config.get("use_dora")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )  # fmt: skip
    except (KeyError, TypeError, RequestError) as error:
        raise FileFormatError(f"{folder}/{CONFIG}: a wrong or missing value: {error}") from error


def _add_names(targets: str | list[str], names: list[str]) -> str | list[str]:
    """Targets and the names of stacked parameters; an expression stays one."""
    if not isinstance(targets, str):
        return [*targets, *names]
    return "|".join((f"(?:{targets})", *(rf"(?:.*\.)?{re.escape(name)}" for name in names)))


def _to_json(value: str | tuple) -> Any:
    """A tuple as a list, and an empty one as null, as PEFT writes them."""
    return value if isinstance(value, str) else list(value) or None


def _to_tuple(value: Any) -> tuple:
    """One value, a list or nothing as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
