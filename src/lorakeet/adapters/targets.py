"""Which modules of a model an adapter is attached to."""

from __future__ import annotations

import difflib
import re

from torch import nn

from lorakeet.adapters.layer import LoraLayer, is_conv1d
from lorakeet.adapters.settings import ALL_LINEAR, Lora
from lorakeet.base.errors import RequestError

HEAD_NAMES = frozenset(
    {"classifier", "score", "pre_classifier", "classification_head", "qa_outputs"}
)


def select_targets(model: nn.Module, settings: Lora) -> list[str]:
    """The names of all modules that a setting selects, in the model's order.

    ``all-linear`` takes every linear layer and Conv1D but the output head and the
    classification head.  A tuple takes names and endings at a dot; one string is a
    name too, or a regular expression over the whole name, as in PEFT.

    Raises:
        RequestError: nothing matches (with near names), or a match cannot be adapted.
    """
    linear = set(linear_names(model)) if settings.targets == ALL_LINEAR else set()
    found = [name for name, _ in _candidates(model) if _is_wanted(name, settings, linear)]
    if not found:
        raise RequestError(_nothing_matches(model, settings))
    return found


def linear_names(model: nn.Module) -> list[str]:
    """The names that ``all-linear`` selects."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in _candidates(model)
        if _is_linear(module)
        and _bare(module) is not _bare(head)
        and not HEAD_NAMES & set(name.split("."))
    ]


def ends_with(name: str, key: str) -> bool:
    """Whether a module's name is a key, or ends with it at a dot."""
    return name == key or name.endswith(f".{key}")


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named modules, with wrapped layers standing for their bases."""
    named, inside = [], []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside[-1:]):
            continue
        named.append((name, module))
        if isinstance(module, LoraLayer):
            inside.append(name)
    return named


def _is_wanted(name: str, settings: Lora, linear: set[str]) -> bool:
    if not name or any(ends_with(name, key) for key in settings.exclude):
        return False
    targets = settings.targets
    if targets == ALL_LINEAR:
        return name in linear
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name)) or ends_with(name, targets)
    return any(ends_with(name, key) for key in targets)


def _is_linear(module: nn.Module) -> bool:
    bare = _bare(module)
    return isinstance(bare, nn.Linear) or (isinstance(bare, nn.Module) and is_conv1d(bare))


def _bare(module: nn.Module | None) -> nn.Module | None:
    """A layer without its wrapper."""
    return module.base_layer if isinstance(module, LoraLayer) else module


def _nothing_matches(model: nn.Module, settings: Lora) -> str:
    """What was asked for, and the names that are near to it."""
    asked = [settings.targets] if isinstance(settings.targets, str) else list(settings.targets)
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear_names(model)})
    near = {hit for key in asked for hit in difflib.get_close_matches(key, endings, n=3)}
    guess = f"Near names: {', '.join(sorted(near))}. " if near else ""
    return (
        f"targets {', '.join(asked)}: no module of this model has such a name. {guess}"
        f"Its linear layers end in {', '.join(endings)}."
    )
