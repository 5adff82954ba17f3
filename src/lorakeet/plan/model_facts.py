"""What a model is made of, read from its ``config.json`` alone.

Every linear layer is listed with its sizes, so the parameters of any adapter can be
counted too; the total equals what transformers builds, to the last parameter.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lorakeet.base.errors import FileFormatError
from lorakeet.base.run_folder import read_json

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer that occurs ``count`` times.

    Args:
        name: the ending of the module's name, such as ``q_proj``.
    """

    name: str
    num_in: int
    num_out: int
    count: int
    has_bias: bool = False

    @property
    def parameters(self) -> int:
        """Weights and biases of all occurrences."""
        return self.count * (self.num_in * self.num_out + self.num_out * self.has_bias)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model in numbers.

    Args:
        linear: the layers that ``all-linear`` means; heads and embeddings are apart.
        other_parameters: embeddings, norms and heads.
        ffn: the inner width of the feed-forward part.
    """

    model_type: str
    parameters: int
    linear: tuple[Linear, ...]
    other_parameters: int
    hidden: int
    layers: int
    ffn: int
    vocabulary: int
    is_decoder: bool


def read_model_facts(folder: Path, *, num_labels: int | None = None) -> ModelFacts:
    """The facts of the model in a folder.

    Args:
        num_labels: rows of the classification head; None for a language model.

    Raises:
        FileFormatError: the architecture is unknown and there are no safetensors to count.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "")
    family = FAMILIES.get(kind)
    if family is None:
        return _count_safetensors(folder, config)
    try:
        linear, other = family(config)
    except KeyError as error:
        raise FileFormatError(f"{folder}/config.json: {error} is missing.") from error
    hidden = _hidden(config)
    if num_labels is not None and kind in ENCODERS:
        other += ENCODERS[kind](hidden, num_labels)
    elif num_labels is not None:
        other += hidden * num_labels - (0 if _is_tied(config) else config["vocab_size"] * hidden)
    return ModelFacts(
        model_type=kind, parameters=sum(layer.parameters for layer in linear) + other,
        linear=tuple(linear), other_parameters=other, hidden=hidden, layers=_layers(config),
        ffn=_ffn(config), vocabulary=config["vocab_size"], is_decoder=kind not in ENCODERS,
    )  # fmt: skip


def _gated(config: Config) -> tuple[list[Linear], int]:
    """Llama and its kin: q, k, v, o and a gated feed-forward part, RMS norms."""
    kind, h, n, f = config["model_type"], _hidden(config), _layers(config), _ffn(config)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or h // heads
    q, kv = heads * head, kv_heads * head
    qkv_bias = kind == "qwen2" or bool(config.get("attention_bias"))
    o_bias = kind in ("llama", "gemma", "gemma2", "gemma3_text", "qwen3") and bool(
        config.get("attention_bias")
    )
    mlp_bias = bool(config.get("mlp_bias")) and kind == "llama"
    if kind == "phi3":
        linear = [Linear(name="qkv_proj", num_in=h, num_out=q + 2 * kv, count=n),
                  Linear(name="o_proj", num_in=q, num_out=h, count=n),
                  Linear(name="gate_up_proj", num_in=h, num_out=2 * f, count=n),
                  Linear(name="down_proj", num_in=f, num_out=h, count=n)]  # fmt: skip
    else:
        linear = [Linear(name="q_proj", num_in=h, num_out=q, count=n, has_bias=qkv_bias),
                  Linear(name="k_proj", num_in=h, num_out=kv, count=n, has_bias=qkv_bias),
                  Linear(name="v_proj", num_in=h, num_out=kv, count=n, has_bias=qkv_bias),
                  Linear(name="o_proj", num_in=q, num_out=h, count=n, has_bias=o_bias),
                  Linear(name="gate_proj", num_in=h, num_out=f, count=n, has_bias=mlp_bias),
                  Linear(name="up_proj", num_in=h, num_out=f, count=n, has_bias=mlp_bias),
                  Linear(name="down_proj", num_in=f, num_out=h, count=n, has_bias=mlp_bias),
    ]  # fmt: skip
    norms_per_layer = 4 if kind in ("gemma2", "gemma3_text") else 2
    qk_norm = 2 * head if kind in ("qwen3", "gemma3_text") else 0
    embeddings = config["vocab_size"] * h * (1 if _is_tied(config) else 2)
    return linear, embeddings + n * (norms_per_layer * h + qk_norm) + h


def _gpt2(config: Config) -> tuple[list[Linear], int]:
    """Fused attention, a plain feed-forward part, learned positions, tied head."""
    h, n, f = config["n_embd"], config["n_layer"], _ffn(config)
    linear = [Linear(name="attn.c_attn", num_in=h, num_out=3 * h, count=n, has_bias=True),
              Linear(name="attn.c_proj", num_in=h, num_out=h, count=n, has_bias=True),
              Linear(name="mlp.c_fc", num_in=h, num_out=f, count=n, has_bias=True),
              Linear(name="mlp.c_proj", num_in=f, num_out=h, count=n, has_bias=True),
    ]  # fmt: skip
    return linear, (config["vocab_size"] + config["n_positions"]) * h + (4 * n + 2) * h


def _neox(config: Config) -> tuple[list[Linear], int]:
    """Fused attention and an untied head."""
    h, n, f = _hidden(config), _layers(config), _ffn(config)
    bias = config.get("attention_bias", True)
    linear = [Linear(name="query_key_value", num_in=h, num_out=3 * h, count=n, has_bias=bias),
              Linear(name="attention.dense", num_in=h, num_out=h, count=n, has_bias=bias),
              Linear(name="dense_h_to_4h", num_in=h, num_out=f, count=n, has_bias=True),
              Linear(name="dense_4h_to_h", num_in=f, num_out=h, count=n, has_bias=True),
    ]  # fmt: skip
    return linear, 2 * config["vocab_size"] * h + (4 * n + 2) * h


def _falcon(config: Config) -> tuple[list[Linear], int]:
    """One fused projection with one or few key-value heads."""
    h, n, f = _hidden(config), _layers(config), _ffn(config)
    head, bias = h // config["num_attention_heads"], bool(config.get("bias"))
    is_new = bool(config.get("new_decoder_architecture"))
    if is_new:
        fused = h + 2 * (config.get("num_kv_heads") or config["num_attention_heads"]) * head
    else:
        fused = h + 2 * head if config.get("multi_query", True) else 3 * h
    norms = 2 if is_new or not config.get("parallel_attn", True) else 1
    linear = [Linear(name="query_key_value", num_in=h, num_out=fused, count=n, has_bias=bias),
              Linear(name="self_attention.dense", num_in=h, num_out=h, count=n, has_bias=bias),
              Linear(name="dense_h_to_4h", num_in=h, num_out=f, count=n, has_bias=bias),
              Linear(name="dense_4h_to_h", num_in=f, num_out=h, count=n, has_bias=bias),
    ]  # fmt: skip
    embeddings = config["vocab_size"] * h * (1 if _is_tied(config) else 2)
    return linear, embeddings + (2 * norms * n + 2) * h


def _phi(config: Config) -> tuple[list[Linear], int]:
    """Separate projections with biases, one norm a layer, a head with a bias."""
    h, n, f = _hidden(config), _layers(config), _ffn(config)
    heads = config["num_attention_heads"]
    kv = (config.get("num_key_value_heads") or heads) * (h // heads)
    linear = [Linear(name="q_proj", num_in=h, num_out=h, count=n, has_bias=True),
              Linear(name="k_proj", num_in=h, num_out=kv, count=n, has_bias=True),
              Linear(name="v_proj", num_in=h, num_out=kv, count=n, has_bias=True),
              Linear(name="dense", num_in=h, num_out=h, count=n, has_bias=True),
              Linear(name="fc1", num_in=h, num_out=f, count=n, has_bias=True),
              Linear(name="fc2", num_in=f, num_out=h, count=n, has_bias=True),
    ]  # fmt: skip
    vocabulary = config["vocab_size"]
    return linear, 2 * vocabulary * h + vocabulary + (2 * n + 2) * h


def _bert(config: Config) -> tuple[list[Linear], int]:
    """BERT, RoBERTa and DistilBERT without their heads."""
    h, n, f = _hidden(config), _layers(config), _ffn(config)
    names = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2") if config[
        "model_type"] == "distilbert" else ("query", "key", "value", "attention.output.dense",
                                            "intermediate.dense", "output.dense")  # fmt: skip
    sizes = [(h, h)] * 4 + [(h, f), (f, h)]
    linear = [
        Linear(name=name, num_in=a, num_out=b, count=n, has_bias=True)
        for name, (a, b) in zip(names, sizes, strict=True)
    ]
    if config["model_type"] == "bert":
        linear.append(Linear(name="pooler.dense", num_in=h, num_out=h, count=1, has_bias=True))
    types = 0 if config["model_type"] == "distilbert" else config.get("type_vocab_size", 2)
    rows = config["vocab_size"] + config["max_position_embeddings"] + types
    return linear, rows * h + 2 * h + 4 * n * h


FAMILIES: dict[str, Callable[[Config], tuple[list[Linear], int]]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), _gated
    ),
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "falcon": _falcon,
    "phi": _phi,
    **dict.fromkeys(("bert", "roberta", "distilbert"), _bert),
}
# parameters of the classification head by (hidden, labels); BERT's pooler counts as linear
ENCODERS: dict[str, Callable[[int, int], int]] = {
    "bert": lambda h, labels: h * labels + labels,
    "roberta": lambda h, labels: h * h + h + h * labels + labels,
    "distilbert": lambda h, labels: h * h + h + h * labels + labels,
}
_TIED_BY_DEFAULT = frozenset({"gemma", "gemma2", "gemma3_text", "gpt2", "falcon"})


def _is_tied(config: Config) -> bool:
    default = config["model_type"] in _TIED_BY_DEFAULT
    return bool(config.get("tie_word_embeddings", default))


def _hidden(config: Config) -> int:
    return next(config[k] for k in ("hidden_size", "n_embd", "dim", "d_model") if k in config)


def _layers(config: Config) -> int:
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return next(config[name] for name in names if name in config)


def _ffn(config: Config) -> int:
    names = ("intermediate_size", "n_inner", "hidden_dim", "ffn_hidden_size")
    found = next((config[name] for name in names if config.get(name)), None)
    return found or 4 * _hidden(config)


def _count_safetensors(folder: Path, config: Config) -> ModelFacts:
    """The facts of an unknown architecture from the headers of its weights.

    A safetensors file begins with the length of its header (8 bytes, little-endian)
    and the header in JSON, with the shape of every tensor.
    """
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        shapes |= {n: v["shape"] for n, v in header.items() if n != "__metadata__"}
    if not shapes:
        raise FileFormatError(
            f"{folder}/config.json: model_type '{config.get('model_type')}' is not known to the "
            f"planner and there are no weights to count. Known are {', '.join(FAMILIES)}."
        )
    linear = [
        Linear(name=name.removesuffix(".weight"), num_in=shape[1], num_out=shape[0], count=1)
        for name, shape in shapes.items()
        if len(shape) == 2 and not any(w in name for w in ("embed", "head", "classifier"))
    ]
    total = sum(prod(shape) for shape in shapes.values())
    return ModelFacts(
        model_type=config.get("model_type", "unknown"), parameters=total, linear=tuple(linear),
        other_parameters=total - sum(layer.parameters for layer in linear),
        hidden=_hidden(config), layers=_layers(config), ffn=_ffn(config),
        vocabulary=config.get("vocab_size", 0), is_decoder=True,
    )  # fmt: skip
