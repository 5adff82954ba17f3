"""Random configurations of every family, and what transformers builds of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

_SIZES = {
    "vocab_size": (97, 128), "hidden_size": (48, 96), "num_hidden_layers": (1, 2, 5),
    "num_attention_heads": (2, 4, 8), "intermediate_size": (40, 64),
    "max_position_embeddings": (32, 64), "tie_word_embeddings": (True, False),
}  # fmt: skip
_KV = {"num_key_value_heads": (1, 2)}
_KV_OR_NULL = {"num_key_value_heads": (1, 2, None)}
_HEAD = {"head_dim": (8, 24)}
_BIAS = {"attention_bias": (True, False)}
_TYPES = {"type_vocab_size": (1, 2, 3)}
_OLD_NAMES = {
    "gpt2": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer",
             "num_attention_heads": "n_head", "intermediate_size": "n_inner",
             "max_position_embeddings": "n_positions"},
    "distilbert": {"hidden_size": "dim", "num_hidden_layers": "n_layers",
                   "num_attention_heads": "n_heads"},
    "bloom": {"hidden_size": "n_embed", "num_hidden_layers": "n_layer",
              "num_attention_heads": "n_head"},
    "falcon": {"hidden_size": "n_embed"},
}  # fmt: skip
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {**_KV_OR_NULL, **_HEAD, **_BIAS, "mlp_bias": (True, False)},
    "mistral": {**_KV, **_HEAD},
    "mixtral": {**_KV, **_HEAD, "num_local_experts": (2, 4)},
    "qwen2": {**_KV_OR_NULL, **_HEAD},
    "qwen3": {**_KV_OR_NULL, **_HEAD, **_BIAS},
    "qwen2_moe": {**_KV, **_HEAD, "num_experts": (4, 6), "moe_intermediate_size": (16, 24),
                  "shared_expert_intermediate_size": (16, 32), "decoder_sparse_step": (1, 2),
                  "mlp_only_layers": ([], [0], [1]), "qkv_bias": (True, False)},
    "qwen3_moe": {**_KV, **_HEAD, **_BIAS, "num_experts": (4, 6), "moe_intermediate_size": (16, 24),
                  "decoder_sparse_step": (1, 2), "mlp_only_layers": ([], [0], [1])},
    "gemma": {**_KV, **_HEAD, **_BIAS},
    "gemma2": {**_KV, **_HEAD, **_BIAS},
    "gemma3_text": {**_KV, **_HEAD, **_BIAS},
    "smollm3": {**_KV_OR_NULL, **_HEAD, **_BIAS, "mlp_bias": (True, False)},
    "phi3": {**_KV_OR_NULL, **_HEAD},
    "phi": {**_KV_OR_NULL, "qk_layernorm": (True, False)},
    "gpt2": {},
    "gpt_neox": _BIAS,
    "falcon": {"multi_query": (True, False), "new_decoder_architecture": (True, False),
               "parallel_attn": (True, False), "bias": (True, False),
               "num_ln_in_parallel_attn": (None, 1, 2), "num_kv_heads": (1, 2, None),
               "ffn_hidden_size": (40, None)},
    "bloom": {},
    "opt": {"ffn_dim": (40, 80), "do_layer_norm_before": (True, False),
            "enable_bias": (True, False), "layer_norm_elementwise_affine": (True, False),
            "_remove_final_layer_norm": (True, False), "word_embed_proj_dim": (16, 48)},
    "bert": _TYPES,
    "roberta": _TYPES,
    "electra": {**_TYPES, "embedding_size": (16, 48)},
    "distilbert": {"hidden_dim": (40, 64)},
    "deberta-v2": {"type_vocab_size": (0, 2), "embedding_size": (16, 48),
                   "position_biased_input": (True, False), "relative_attention": (True, False),
                   "pos_att_type": ("c2p|p2c", ["p2c"], None), "share_att_key": (True, False),
                   "norm_rel_ebd": ("layer_norm", "none"), "position_buckets": (-1, 8),
                   "max_relative_positions": (-1, 16), "conv_kernel_size": (0, 3),
                   "conv_groups": (1, 2)},
}  # fmt: skip
WITHOUT_LANGUAGE_HEAD = ("distilbert", "deberta-v2")
CASES = [
    (family, seed)
    for family, options in OPTIONS.items()
    for seed in range(4 if len(options) < 5 else 12)  # more where more can be switched
]


def random_config(family: str, seed: int) -> dict[str, Any]:
    """A configuration with some keys left out, so that the family's defaults count."""
    rng = random.Random(f"{family} {seed}")
    asked = {**_SIZES, **OPTIONS[family]}
    kept = {name: rng.choice(values) for name, values in asked.items() if rng.random() < 0.7}
    kept.setdefault("num_hidden_layers", 2)  # the default of 32 is counted in another test
    kept.setdefault("hidden_size", 96)
    kept.setdefault("num_attention_heads", 8)
    if family in ("smollm3", "phi3"):
        kept["pad_token_id"] = 0  # the default lies outside so small a vocabulary
    if seed % 2:
        old = _OLD_NAMES.get(family, {})
        kept = {old.get(name, name): value for name, value in kept.items()}
    return {"model_type": family, **kept}


def build_empty(config: dict[str, Any], num_labels: int | None) -> torch.nn.Module:
    """What transformers builds, without memory for its weights."""
    parsed = AutoConfig.for_model(**config)
    model_class = AutoModelForCausalLM
    if num_labels is not None:
        parsed.num_labels, model_class = num_labels, AutoModelForSequenceClassification
    with torch.device("meta"):
        return model_class.from_config(parsed)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """A folder's ``config.json``."""
    (folder / "config.json").write_text(json.dumps(config))
