"""The names of an adapter's tensors in a file, which are PEFT's.

<module>.lora_A.weight            factors; lora_embedding_A and B have no ``.weight``
<module>.lora_magnitude_vector    DoRA's m
<module>.weight, .bias            modules trained in full, and trained biases
<module>.base_layer.bias          the trained bias of an adapted layer
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakeet.adapters.attach import KINDS, adapter_tensors, settings_of
from lorakeet.adapters.experts import LoraExperts, file_owner
from lorakeet.adapters.layer import SavedModule
from lorakeet.adapters.plain import PREFIX, to_plain_tensors
from lorakeet.adapters.vera import shared_tensors

_WRAPPED_BIAS = re.compile(r"\.(original_module|modules_to_save)\.(.*\.)?bias$")


def to_file_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under the names of the file, on the CPU.

    PEFT wraps the heads of a classifier unasked and cannot load a file without them, so
    heads that are not trained stand in the file with the base's own weights.
    """
    named = to_plain_tensors(to_file_names(model, name), model, name)
    keys = list(settings_of(model)[name].modules_to_save)
    keys += ["classifier", "score"] if "ForSequenceClassification" in type(model).__name__ else []
    for path, module in model.named_modules():
        is_head = path.endswith(tuple(keys)) if keys else False
        if is_head and not _is_trained(module, name):
            for key, tensor in module.state_dict().items():
                if not any(f".{kind}." in f".{path}.{key}." for kind in KINDS):
                    bare = f"{PREFIX}{path}.{key}".replace(".base_layer.", ".")
                    named.setdefault(bare, tensor)
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in named.items()}


def to_file_names(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors by their names in a file; adapted layers keep theirs inside."""
    named = {}
    for path, tensor in adapter_tensors(model, name).items():
        file_name = to_file_name(path, name)
        owner, _, rest = path.rpartition(".trained_bias.")
        if rest == name and name in getattr(model.get_submodule(owner), "ranks", ()):
            file_name = f"{PREFIX}{owner}.base_layer.bias"
        held, _, last = path.rpartition(".lora_")
        if held and isinstance(model.get_submodule(held), LoraExperts):
            owner = file_owner(model, held, name)
            file_name = f"{PREFIX}{owner}.lora_{last.replace(f'.{name}.', '.')}"
        named[file_name] = tensor
    return named | shared_tensors(model, name)


def to_file_name(path: str, name: str) -> str:
    """A parameter's name in the file: no adapter name, no wrapper names.

    >>> to_file_name("h.0.c_attn.lora_A.default.weight", "default")
    'base_model.model.h.0.c_attn.lora_A.weight'
    >>> to_file_name("score.modules_to_save.default.weight", "default")
    'base_model.model.score.weight'
    """
    kinds = "|".join(KINDS)
    if path.endswith(f".trained_bias.{name}"):
        return f"{PREFIX}{path.removesuffix(f'.trained_bias.{name}')}.bias"
    owner, kind, rest = re.fullmatch(rf"(.*)\.({kinds})\.{re.escape(name)}(\..*)?", path).groups()
    return f"{PREFIX}{owner}{'' if kind == 'modules_to_save' else f'.{kind}'}{rest or ''}"


def without_base(
    model: nn.Module, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors less copies that PEFT adds.

    These are base weights beside adapted embeddings, and with ``bias: all`` the biases of
    saved modules a second time, under the names of its wrappers.
    """
    base = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        base[PREFIX + path] = base[PREFIX + path.replace(".base_layer.", ".")] = parameter
    return {
        key: tensor
        for key, tensor in tensors.items()
        if key in wanted
        or not _WRAPPED_BIAS.search(key)
        and (key not in base or not _is_copy(tensor, base[key]))
    }


def _is_copy(tensor: Tensor, base: Tensor) -> bool:
    """Whether a tensor holds the base's numbers, in whatever dtype."""
    return tensor.shape == base.shape and torch.equal(tensor.to(base.dtype), base.detach().cpu())


def _is_trained(module: nn.Module, name: str) -> bool:
    """Whether an adapter adapts a module or what lies in it, or trains it in full."""
    return any(
        name in getattr(each, "ranks", ()) or isinstance(each, SavedModule)
        for each in module.modules()
    )
