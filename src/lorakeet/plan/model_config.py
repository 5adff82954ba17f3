"""A model's ``config.json`` with the family's own defaults, one set of names, and checked.

A key that is missing has the value that transformers gives it, which differs by family:
``num_key_value_heads`` is 8 in a Mistral and the number of heads in a Llama.  ``null`` is
no missing key: there it means "as many as heads", "hidden_size / heads" or "4 x hidden_size".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakeet.base.errors import FileFormatError
from lorakeet.base.run_folder import read_json

Config = dict[str, Any]

# transformers' names for one thing, the first that is there counts; ours is the key
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "hidden_size": ("hidden_size", "n_embd"), "intermediate_size": ("n_inner",),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    },
    "bloom": {
        "hidden_size": ("n_embed", "hidden_size"), "intermediate_size": (),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_attention_heads": ("num_attention_heads", "n_head"),
    },
    "falcon": {
        "hidden_size": ("n_embed", "hidden_size"), "intermediate_size": ("ffn_hidden_size",),
    },
    "opt": {"intermediate_size": ("ffn_dim",)},
    "distilbert": {
        "hidden_size": ("hidden_size", "dim"), "intermediate_size": ("hidden_dim",),
        "num_hidden_layers": ("num_hidden_layers", "n_layers"),
        "num_attention_heads": ("num_attention_heads", "n_heads"),
    },
    "mixtral": {"num_experts": ("num_experts", "num_local_experts")},
    "qwen3_moe": {"num_experts": ("num_experts", "num_local_experts")},
}  # fmt: skip


def _sizes(vocab: int, hidden: int, layers: int, heads: int, ffn: int | None) -> Config:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": ffn,
    }  # fmt: skip


_QWEN = _sizes(151936, 4096, 32, 32, 22016)
_GEMMA2 = _sizes(256000, 2304, 26, 8, 9216)
_BERT = {
    **_sizes(30522, 768, 12, 12, 3072), "max_position_embeddings": 512, "type_vocab_size": 2,
    "tie_word_embeddings": True,
}  # fmt: skip

# what transformers 5 puts in the place of a key that is missing, where that is not null or false
DEFAULTS: dict[str, Config] = {
    "llama": _sizes(32000, 4096, 32, 32, 11008),
    "mistral": {**_sizes(32000, 4096, 32, 32, 14336), "num_key_value_heads": 8},
    "mixtral": {**_sizes(32000, 4096, 32, 32, 14336), "num_key_value_heads": 8,
                "num_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {**_QWEN, "num_key_value_heads": 32},
    "qwen3": {**_QWEN, "num_key_value_heads": 32, "head_dim": 128},
    "qwen2_moe": {**_sizes(151936, 2048, 24, 16, 5632), "num_key_value_heads": 16,
                  "num_experts": 60, "num_experts_per_tok": 4, "decoder_sparse_step": 1,
                  "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
                  "qkv_bias": True},
    "qwen3_moe": {**_sizes(151936, 2048, 24, 32, 6144), "num_key_value_heads": 4,
                  "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
                  "moe_intermediate_size": 768},
    "gemma": {**_sizes(256000, 3072, 28, 16, 24576), "num_key_value_heads": 16, "head_dim": 256,
              "tie_word_embeddings": True},
    "gemma2": {**_GEMMA2, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    "gemma3_text": {**_GEMMA2, "vocab_size": 262208, "num_key_value_heads": 4, "head_dim": 256,
                    "tie_word_embeddings": True},
    "smollm3": {**_sizes(128256, 2048, 36, 16, 11008), "num_key_value_heads": 4,
                "tie_word_embeddings": True},
    "phi3": _sizes(32064, 3072, 32, 32, 8192),
    "phi": _sizes(51200, 2048, 24, 32, 8192),
    "gpt2": {**_sizes(50257, 768, 12, 12, None), "max_position_embeddings": 1024,
             "tie_word_embeddings": True},
    "gpt_neox": {**_sizes(50432, 6144, 44, 64, 24576), "attention_bias": True},
    "falcon": {**_sizes(65024, 4544, 32, 71, None), "multi_query": True, "parallel_attn": True,
               "tie_word_embeddings": True},
    "opt": {**_sizes(50272, 768, 12, 12, 3072), "max_position_embeddings": 2048,
            "do_layer_norm_before": True, "enable_bias": True,
            "layer_norm_elementwise_affine": True, "tie_word_embeddings": True},
    "bloom": {**_sizes(250880, 64, 2, 8, None), "tie_word_embeddings": True},
    "bert": _BERT,
    "roberta": {**_BERT, "vocab_size": 50265},
    "distilbert": {**_BERT, "num_hidden_layers": 6},
    "electra": {**_BERT, **_sizes(30522, 256, 12, 4, 1024), "embedding_size": 128},
    "deberta-v2": {**_sizes(128100, 1536, 24, 24, 6144), "max_position_embeddings": 512,
                   "type_vocab_size": 0, "position_biased_input": True,
                   "max_relative_positions": -1, "position_buckets": -1},
}  # fmt: skip
_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "num_experts",
    "num_experts_per_tok", "decoder_sparse_step", "moe_intermediate_size", "embedding_size",
    "shared_expert_intermediate_size", "word_embed_proj_dim", "num_kv_heads",
    "attention_head_size", "pooler_hidden_size",
)  # fmt: skip
_WHOLE = (
    "type_vocab_size", "conv_kernel_size", "position_buckets", "max_relative_positions",
    "conv_groups", "num_ln_in_parallel_attn",
)  # fmt: skip
_DERIVED = ("num_key_value_heads", "head_dim")  # null means: as many as heads, hidden / heads
_WORDS = {"mlp_only_layers": (list,), "pos_att_type": (list, str), "norm_rel_ebd": (str,)}


def read_model_config(folder: Path) -> Config:
    """The configuration of a model with this module's names and its family's defaults.

    Raises:
        FileFormatError: there is no such file, it is no JSON object, or sizes in it are no
            positive whole numbers (all of them are named).
    """
    path = folder / "config.json"
    found = read_json(path)
    if not isinstance(found, dict):
        raise FileFormatError(
            f"{path}: this is a JSON {type(found).__name__}, needed is an object with model_type "
            "and sizes, as transformers writes it. Fetch the model again."
        )
    kind = found.get("model_type") or ""
    if not isinstance(kind, str):
        raise FileFormatError(
            f"{path}: model_type is {kind!r}, needed is a name such as 'llama'. Fetch the model "
            "again."
        )
    usual = DEFAULTS.get(kind, {})
    config = {**usual, **found, "model_type": kind}
    for name, others in ALIASES.get(kind, {}).items():
        config[name] = next((found[other] for other in others if other in found), usual.get(name))
    problems = _list_problems(config, usual)
    if problems:
        raise FileFormatError(
            f"{path}: {', '.join(problems)}. The file is damaged or edited; fetch the model again."
        )
    return config


def _list_problems(config: Config, usual: Config) -> list[str]:
    """Every size that is no whole number of at least 1, and every value of a wrong type.

    ``null`` passes where the family derives the value.
    """
    problems = []
    for name in _POSITIVE:
        is_needed = usual.get(name) is not None and name not in _DERIVED
        value = config.get(name)
        if (value is not None or is_needed) and not (_is_whole(value) and value >= 1):
            problems.append(f"{name} is {value!r}, needed is a whole number of at least 1")
    for name in _WHOLE:
        value = config.get(name)
        if value is not None and not _is_whole(value):
            problems.append(f"{name} is {value!r}, needed is a whole number")
    for name, types in _WORDS.items():
        value = config.get(name)
        if value is not None and not isinstance(value, types):
            problems.append(f"{name} is {value!r}, needed is a {types[0].__name__}")
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not problems and usual and not config.get("head_dim") and heads > hidden:
        problems.append(f"{heads} attention heads share a hidden_size of {hidden}, needed is at "
                        "least one number a head")  # fmt: skip
    return problems


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
