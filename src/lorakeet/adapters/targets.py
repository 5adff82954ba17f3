"""Which modules of a model an adapter is attached to."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from torch import nn

from lorakeet.adapters.bias import BiasLayer
from lorakeet.adapters.experts import is_stacked, sizes_of_experts, stacked_parameters
from lorakeet.adapters.layer import LoraLayer, SavedModule, is_linear, sizes_of
from lorakeet.adapters.settings import ALL_LINEAR, DEFAULT_START, Lora
from lorakeet.base.errors import RequestError

HEAD_NAMES = frozenset(
    {"classifier", "score", "pre_classifier", "classification_head", "qa_outputs"}
)


def select_targets(model: nn.Module, settings: Lora) -> list[str]:
    """The names of all modules that a setting selects, in the model's order.

    ``all-linear`` takes every linear layer and Conv1D but the output head and the
    classification head; experts stacked in one parameter are taken by name.
    A tuple takes names and endings at a dot; one string is a name too, or a regular
    expression over the whole name, as in PEFT.

    Raises:
        RequestError: nothing matches (with near names), or a pattern is no regular expression.
    """
    _check_patterns(settings)
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
        if is_linear(_bare(module))
        and _bare(module) is not _bare(head)
        and not HEAD_NAMES & set(name.split("."))
    ]


def check_ranks(model: nn.Module, settings: Lora, targets: list[str]) -> None:
    """Whether every rank fits its matrix; PiSSA needs as many singular values as r.

    Raises:
        RequestError: some rank is too large, with the list of modules.
    """
    problems = []
    for path in targets:
        bare = None if is_stacked(model, path) else _bare(model.get_submodule(path))
        if bare is not None and not is_linear(bare) and not _is_matrix(bare):
            continue  # wrapping tells of it
        r, (num_in, num_out, _) = settings.rank_of(path), sizes_at(model, path)
        most = max(num_in, num_out) if settings.start == DEFAULT_START else min(num_in, num_out)
        if r > most and settings.vera is None:
            problems.append(f"{path}: rank {r} is larger than this {num_out} x {num_in} matrix")
        method = "AdaLoRA" if settings.adalora else "VeRA" if settings.vera is not None else None
        if method and isinstance(bare, (nn.Embedding, nn.Conv2d)):
            kind = "embeddings" if isinstance(bare, nn.Embedding) else "convolutions"
            problems.append(f"{path}: {method} adapts linear layers, not {kind}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise RequestError(
            f"{'; '.join(problems[:3])}{more}. Choose a smaller rank, a rank_pattern for these "
            "modules, or other targets."
        )


def sizes_at(model: nn.Module, target: str) -> tuple[int, int, int]:
    """(in, out) of the matrix at a target, and how many there are: E for stacked experts."""
    if is_stacked(model, target):
        return sizes_of_experts(model, target)
    return *sizes_of(_bare(model.get_submodule(target))), 1


def check_layers(settings: Lora, targets: list[str]) -> None:
    """Whether every layer of ``layers`` has a target.

    Raises:
        RequestError: some have none, as beyond the model's last layer.
    """
    found = {layer_of(path, settings.layers_pattern) for path in targets}
    if lost := [number for number in settings.layers if number not in found]:
        told = f"{lost[0]} to {lost[-1]}" if len(lost) > 3 else ", ".join(map(str, lost))
        raise RequestError(
            f"layers {told}: no target lies there; the highest layer with one is "
            f"{max(found)}. Layers are counted from 0."
        )


def select_saved(model: nn.Module, settings: Lora, targets: list[str]) -> list[str]:
    """The full names of ``modules_to_save``, the outermost of nested ones.

    Raises:
        RequestError: a name matches nothing, or a target lies inside one.
    """
    keys = settings.modules_to_save
    modules = [p for p, module in _candidates(model) if p and isinstance(module, nn.Module)]
    found = [path for path in modules if any(ends_with(path, key) for key in keys)]
    missing = [key for key in keys if not any(ends_with(path, key) for path in found)]
    if missing:
        tops = ", ".join(n for n, _ in model.named_children())
        raise RequestError(
            f"modules_to_save {', '.join(missing)}: the model has no such module. At the top it "
            f"has {tops}."
        )
    inside = [target for target in targets if is_inside(target, found)]
    if inside:
        raise RequestError(
            f"{inside[0]} is adapted and lies in modules_to_save; a module is adapted or trained "
            "in full, not both. Take it out of one of the two."
        )
    return [path for path in found if not any(path.startswith(f"{p}.") for p in found)]


def is_inside(name: str, outer: list[str]) -> bool:
    """Whether a module is one of others or lies in one of them."""
    return any(name == path or name.startswith(f"{path}.") for path in outer)


def layer_of(name: str, patterns: tuple[str, ...] = ()) -> int | None:
    """The number of the layer that a module lies in, or None: the first number in its name.

    Args:
        patterns: regular expressions of what stands before the number; empty for any word.

    >>> layer_of("model.layers.3.experts.0.up"), layer_of("model.h.3.fc", ("layers",))
    (3, None)
    """
    words = "|".join(f"(?:{pattern})" for pattern in patterns) or r"[^.]*"
    found = re.match(rf"(?:.*?\.)??(?:{words})\.(\d+)\.", name)
    return int(found[1]) if found else None


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
        named += stacked_parameters(name, module)
        if isinstance(module, (LoraLayer, SavedModule, BiasLayer)):
            inside.append(name)
    return named


def _is_wanted(name: str, settings: Lora, linear: set[str]) -> bool:
    if not name or _is_excluded(name, settings.exclude):
        return False
    if settings.layers and layer_of(name, settings.layers_pattern) not in settings.layers:
        return False
    targets = settings.targets
    if targets == ALL_LINEAR:
        return name in linear
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name)) or ends_with(name, targets)
    return any(ends_with(name, key) for key in targets)


def _is_excluded(name: str, exclude: str | tuple[str, ...]) -> bool:
    """As in PEFT: one string is a regular expression, several are names or endings."""
    if isinstance(exclude, str):
        return bool(re.fullmatch(exclude, name))
    return any(ends_with(name, key) for key in exclude)


def _check_patterns(settings: Lora) -> None:
    """Every text that is used as a regular expression must be one."""
    patterns = [*settings.rank_pattern, *settings.alpha_pattern, *settings.layers_pattern]
    patterns += [text for text in (settings.targets, settings.exclude) if isinstance(text, str)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RequestError(
                f"'{pattern}' is not a regular expression ({error}). Correct it, or give a "
                "module's name."
            ) from error


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module's weight has rows and columns."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() >= 2


def _bare(module: nn.Module | None) -> nn.Module | None:
    """A layer without its wrapper."""
    if isinstance(module, (LoraLayer, BiasLayer)):
        return module.base_layer
    return module.original_module if isinstance(module, SavedModule) else module


def _count_without_exclude(model: nn.Module, settings: Lora) -> int:
    """How many modules the targets would select if nothing were excluded."""
    free = replace(settings, exclude=())
    linear = set(linear_names(model)) if settings.targets == ALL_LINEAR else set()
    return sum(_is_wanted(name, free, linear) for name, _ in _candidates(model))


def _nothing_matches(model: nn.Module, settings: Lora) -> str:
    """What was asked for, and the names that are near to it."""
    asked = [settings.targets] if isinstance(settings.targets, str) else list(settings.targets)
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear_names(model)})
    if settings.exclude and (every := _count_without_exclude(model, settings)):
        return (
            f"targets {', '.join(asked)}: exclude passes over all {every} modules that they name. "
            "Take a name out of one of the two."
        )
    near = {hit for key in asked for hit in difflib.get_close_matches(key, endings, n=3)}
    guess = f"Near names: {', '.join(sorted(near))}. " if near else ""
    if settings.layers:
        guess += f"Only layers {', '.join(map(str, settings.layers))} were looked at. "
    return (
        f"targets {', '.join(asked)}: no module of this model has such a name. {guess}"
        f"Its linear layers end in {', '.join(endings)}."
    )
