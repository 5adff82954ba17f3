"""What a model is made of, read from its ``config.json`` alone.

Every module is listed with its name and sizes, so what any adapter adds can be counted
too; the total equals what transformers builds, to the last parameter.  An architecture
that ``plan.families`` does not know is counted from the headers of its weights.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lorakeet.base.errors import FileFormatError
from lorakeet.plan.families import FAMILIES, list_parts
from lorakeet.plan.model_config import Config, read_model_config
from lorakeet.plan.parts import Part, embedding, head, linear

_LENGTH_BYTES = 8  # a safetensors file begins with its header's length, little-endian
_SIXTEEN_BITS = ("bfloat16", "float16")
_HEADS = ("lm_head", "embed_out", "classifier", "score", "pre_classifier", "output_head")
_TABLES = ("embed", "wte", "wpe", "shared")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model in numbers.

    Args:
        parts: every module that holds parameters.
        ffn: the inner width of the feed-forward part; of all experts together that a token is
            sent to.
        vocabulary: rows of the output head: tokens, or classes of a classifier.
        stored_bytes: of a weight of a frozen linear layer as the checkpoint holds it, in which
            it is kept on a CPU too; 4 for GPT-2's layers, which are kept wide.
    """

    model_type: str
    parts: tuple[Part, ...]
    hidden: int
    layers: int
    ffn: int
    vocabulary: int
    is_decoder: bool
    stored_bytes: int = 4

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(part.parameters for part in self.parts)

    @property
    def linear_parameters(self) -> int:
        """Parameters in the layers that ``all-linear`` means, which quantisation shrinks."""
        return sum(part.parameters for part in self.parts if part.kind == "linear")

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward part has a gate beside its first matrix."""
        ends = ("gate_proj", "gate_up_proj")
        return any(p.kind == "experts" or p.path.endswith(ends) for p in self.parts)

    @property
    def has_head_norms(self) -> bool:
        """Whether queries and keys pass norms of their own, as in Qwen3 and Gemma 3."""
        return any(part.path.endswith("q_norm") for part in self.parts)

    @property
    def query_width(self) -> int:
        """The width of all query heads together: what attention's output matrix takes in."""
        ends = (".o_proj", ".out_proj", ".out_lin", ".dense", ".c_proj", ".wo")
        found = [p.num_in for p in self.parts if p.kind == "linear" and p.path.endswith(ends)]
        return found[0] if found else self.hidden

    @property
    def key_width(self) -> int:
        """The width of all key heads together."""
        found = [p.num_out for p in self.parts if p.path.endswith("k_proj")]
        return found[0] if found else self.query_width

    @property
    def multiplied(self) -> float:
        """Weights that one token is multiplied by: linear layers, used experts and the head."""
        return sum(part.multiplied for part in self.parts)


def read_model_facts(folder: Path, *, num_labels: int | None = None) -> ModelFacts:
    """The facts of the model in a folder.

    Args:
        num_labels: rows of the classification head; None for a language model.

    Raises:
        FileFormatError: ``config.json`` has no usable sizes, or the architecture is unknown
            and there are no readable safetensors to count.
    """
    config = read_model_config(folder)
    if config["model_type"] not in FAMILIES:
        return _count_weights(folder, config, num_labels)
    return build_facts(config, num_labels=num_labels)


def build_facts(config: Config, *, num_labels: int | None = None) -> ModelFacts:
    """The facts of a known architecture from its configuration, in ``model_config``'s names."""
    hidden, kind = config["hidden_size"], config["model_type"]
    return ModelFacts(
        model_type=kind, parts=tuple(list_parts(config, num_labels)), hidden=hidden,
        layers=config["num_hidden_layers"], ffn=_find_ffn(config),
        vocabulary=config["vocab_size"] if num_labels is None else num_labels,
        is_decoder=FAMILIES[kind].is_decoder, stored_bytes=_count_stored_bytes(config),
    )  # fmt: skip


def _find_ffn(config: Config) -> int:
    """The feed-forward width that a token passes: a dense layer's, or its experts' together."""
    dense = config.get("intermediate_size") or 4 * config["hidden_size"]
    if "num_experts" not in config:
        return dense
    width = config.get("moe_intermediate_size") or dense
    shared = config.get("shared_expert_intermediate_size") or 0
    return min(config["num_experts_per_tok"], config["num_experts"]) * width + shared


def _count_stored_bytes(config: Config) -> int:
    """Bytes of a weight in the checkpoint, as its configuration says."""
    named = config.get("dtype") or config.get("torch_dtype")
    return 2 if named in _SIXTEEN_BITS and config["model_type"] != "gpt2" else 4


def _count_weights(folder: Path, config: Config, num_labels: int | None) -> ModelFacts:
    """The facts of an unknown architecture from the shapes of its weights.

    For a classifier the language head gives way to a new one.

    Raises:
        FileFormatError: there are no weights, or ``config.json`` lacks the sizes.
    """
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes |= read_shapes(path)
    if not shapes:
        raise FileFormatError(
            f"{folder}/config.json: model_type {config['model_type']!r} is not known to the "
            "planner, and there are no safetensors to count. Needed is a known model_type "
            f"({', '.join(FAMILIES)}) or the weights beside config.json."
        )
    hidden = _size(folder, config, "hidden_size", "n_embd", "dim", "d_model")
    layers = _size(folder, config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    used = _used_fraction(_text_config(config))
    parts = [_to_part(name, shape, used) for name, shape in shapes.items()]
    vocabulary = _text_config(config).get("vocab_size")
    if num_labels is not None:
        parts = [part for part in parts if part.kind != "head"]
        parts.append(head("score", hidden, num_labels))
        vocabulary = num_labels
    ffn = max((part.num_out for part in parts if part.kind == "linear"), default=4 * hidden)
    return ModelFacts(
        model_type=config["model_type"] or "unknown", parts=tuple(parts), hidden=hidden,
        layers=layers, ffn=ffn, vocabulary=vocabulary if isinstance(vocabulary, int) else 0,
        is_decoder=True,
    )  # fmt: skip


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of every tensor in a safetensors file, from its header alone.

    Raises:
        FileFormatError: the header is cut off or is not what the format asks for.

    Source: the format's description, github.com/huggingface/safetensors.
    """
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else 0
        room = path.stat().st_size - _LENGTH_BYTES
        text = file.read(length) if 0 < length <= room else b""
    try:
        header = json.loads(text) if text else None
    except (json.JSONDecodeError, UnicodeDecodeError):
        header = None
    tensors = {n: t for n, t in header.items() if n != "__metadata__"} if _is_dict(header) else None
    if tensors is None or not all(_is_dict(t) and _is_shape(t.get("shape")) for t in
                                  tensors.values()):  # fmt: skip
        raise FileFormatError(
            f"{path}: {path.stat().st_size} bytes without a whole safetensors header; needed are "
            "8 bytes of length and a JSON object with the shape of each tensor. The file is cut "
            "off or damaged; fetch the model again."
        )
    return {name: tensor["shape"] for name, tensor in tensors.items()}


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and n >= 0 for n in value)


def _to_part(name: str, shape: list[int], used_fraction: float) -> Part:
    """A tensor as a part: matrices are linear layers, heads, tables or experts by their name.

    Experts are one fused module in transformers 5, which LoRA does not adapt.
    """
    path, weights = name.removesuffix(".weight"), prod(shape)
    if ".experts." in f".{path}.":
        return Part(path=path, kind="experts", weights=weights, used_fraction=used_fraction)
    is_matrix = len(shape) == 2 and name.endswith(".weight")
    if any(word in path.split(".") for word in _HEADS):
        return head(path, shape[1], shape[0]) if is_matrix else _other(name, weights, "head")
    if is_matrix and any(word in path for word in _TABLES):
        return embedding(path, *shape)
    return linear(path, shape[1], shape[0]) if is_matrix else _other(name, weights, "norm")


def _used_fraction(config: Config) -> float:
    """The share of the experts that a token is sent to; 1 where the configuration is silent."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    num = next((config[name] for name in names if config.get(name)), None)
    used = config.get("num_experts_per_tok")
    is_told = all(isinstance(n, int) and n > 0 for n in (num, used))
    return min(used / num, 1.0) if is_told else 1.0


def _other(name: str, weights: int, kind: str) -> Part:
    """A tensor that is no matrix: a bias belongs to its module."""
    return Part(path=name.rsplit(".", 1)[0], kind=kind, weights=weights)


def _text_config(config: Config) -> Config:
    """The part about text of a configuration that also speaks of pictures or sound."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _size(folder: Path, config: Config, *names: str) -> int:
    """The first of several keys that is there.

    Raises:
        FileFormatError: none is a positive whole number.
    """
    found = _text_config(config)
    for name in names:
        value = found.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
    raise FileFormatError(
        f"{folder}/config.json: model_type {config['model_type']!r} is not known to the planner, "
        f"and {names[0]} is missing or no positive whole number. It is needed to tell memory; "
        "add it, or fetch the model again."
    )
