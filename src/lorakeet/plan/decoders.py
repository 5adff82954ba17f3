"""The parts of each decoder family, as transformers builds it.

Each function returns the body: embeddings, layers and the last norm.  Heads are added by
``plan.families``.  H hidden, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from lorakeet.plan.model_config import Config
from lorakeet.plan.parts import Part, embedding, in_layers, linear, norm


def list_gated(config: Config) -> list[Part]:
    """Llama and its kin: q, k, v, o, a gated feed-forward part, RMS norms."""
    layer, n = "model.layers.{}.", range(config["num_hidden_layers"])
    hidden, width = config["hidden_size"], config["intermediate_size"]
    gated = _gate(f"{layer}mlp.", hidden, width, has_bias=_has_mlp_bias(config))
    return [
        *_ends(config),
        *in_layers([*_attention(config, f"{layer}self_attn."), *_norms(config, layer), *gated], n),
    ]


def list_experts(config: Config) -> list[Part]:
    """Mixtral and Qwen-MoE: a router sends each token to a few of E feed-forward parts."""
    layer, layers = "model.layers.{}.", range(config["num_hidden_layers"])
    hidden, dense_width = config["hidden_size"], config["intermediate_size"]
    is_qwen = config["model_type"] in ("qwen2_moe", "qwen3_moe")
    width = config["moe_intermediate_size"] if is_qwen else dense_width
    num, used = config["num_experts"], config["num_experts_per_tok"]
    sparse = [i for i in layers if not is_qwen or _is_sparse(config, i)]
    experts = [
        norm(f"{layer}mlp.gate", num * hidden),
        Part(
            path=f"{layer}mlp.experts", kind="experts", weights=3 * num * hidden * width,
            num_in=hidden, num_out=width, used_fraction=min(used / num, 1.0),
        ),
    ]  # fmt: skip
    if config["model_type"] == "qwen2_moe":
        shared = config["shared_expert_intermediate_size"]
        experts += _gate(f"{layer}mlp.shared_expert.", hidden, shared)
        experts.append(linear(f"{layer}mlp.shared_expert_gate", hidden, 1))
    always = [*_attention(config, f"{layer}self_attn."), *_norms(config, layer)]
    dense = _gate(f"{layer}mlp.", hidden, dense_width)
    return [
        *_ends(config),
        *in_layers(always, layers),
        *in_layers(experts, sparse),
        *in_layers(dense, [i for i in layers if i not in sparse]),
    ]


def _is_sparse(config: Config, layer: int) -> bool:
    is_dense = layer in (config.get("mlp_only_layers") or ())
    return not is_dense and (layer + 1) % config["decoder_sparse_step"] == 0


def _ends(config: Config) -> list[Part]:
    hidden = config["hidden_size"]
    return [
        embedding("model.embed_tokens", config["vocab_size"], hidden),
        norm("model.norm", hidden),
    ]


def _attention(config: Config, at: str) -> list[Part]:
    """q, k, v, o with the biases of each family; Phi-3 fuses the first three."""
    kind, hidden, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    q, kv = heads * size, (config.get("num_key_value_heads") or heads) * size
    if kind == "phi3":
        return [linear(f"{at}qkv_proj", hidden, q + 2 * kv), linear(f"{at}o_proj", q, hidden)]
    asked = bool(config.get("attention_bias")) and kind not in ("mistral", "mixtral")
    qkv_bias = {"qwen2": True, "qwen2_moe": bool(config.get("qkv_bias"))}.get(kind, asked)
    o_bias = asked and kind not in ("qwen2", "qwen2_moe")
    norms = [norm(f"{at}{name}_norm", size) for name in "qk"]
    return [
        linear(f"{at}q_proj", hidden, q, has_bias=qkv_bias),
        linear(f"{at}k_proj", hidden, kv, has_bias=qkv_bias),
        linear(f"{at}v_proj", hidden, kv, has_bias=qkv_bias),
        linear(f"{at}o_proj", q, hidden, has_bias=o_bias),
        *(norms if kind in ("qwen3", "qwen3_moe", "gemma3_text") else ()),
    ]


def _norms(config: Config, at: str) -> list[Part]:
    names = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] in ("gemma2", "gemma3_text"):
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return [norm(f"{at}{name}", config["hidden_size"]) for name in names]


def _has_mlp_bias(config: Config) -> bool:
    return bool(config.get("mlp_bias")) and config["model_type"] in ("llama", "smollm3")


def _gate(at: str, hidden: int, width: int, *, has_bias: bool = False) -> list[Part]:
    """The gated feed-forward part, down(act(gate x) * up x)."""
    return [
        linear(f"{at}gate_proj", hidden, width, has_bias=has_bias),
        linear(f"{at}up_proj", hidden, width, has_bias=has_bias),
        linear(f"{at}down_proj", width, hidden, has_bias=has_bias),
    ]


def list_phi3(config: Config) -> list[Part]:
    """Phi-3: as Llama, with q, k, v in one matrix and gate, up in another."""
    layer, hidden, width = "model.layers.{}.", config["hidden_size"], config["intermediate_size"]
    parts = [
        *_attention(config, f"{layer}self_attn."),
        linear(f"{layer}mlp.gate_up_proj", hidden, 2 * width),
        linear(f"{layer}mlp.down_proj", width, hidden),
        *_norms(config, layer),
    ]
    return [*_ends(config), *in_layers(parts, range(config["num_hidden_layers"]))]


def list_gpt2(config: Config) -> list[Part]:
    """GPT-2: fused attention, a plain feed-forward part, learned positions."""
    layer, h = "transformer.h.{}.", config["hidden_size"]
    f = config["intermediate_size"] or 4 * h
    parts = [
        norm(f"{layer}ln_1", h, has_bias=True),
        linear(f"{layer}attn.c_attn", h, 3 * h, has_bias=True),
        linear(f"{layer}attn.c_proj", h, h, has_bias=True),
        norm(f"{layer}ln_2", h, has_bias=True),
        linear(f"{layer}mlp.c_fc", h, f, has_bias=True),
        linear(f"{layer}mlp.c_proj", f, h, has_bias=True),
    ]
    return [
        embedding("transformer.wte", config["vocab_size"], h),
        embedding("transformer.wpe", config["max_position_embeddings"], h),
        *in_layers(parts, range(config["num_hidden_layers"])),
        norm("transformer.ln_f", h, has_bias=True),
    ]


def list_neox(config: Config) -> list[Part]:
    """Pythia and GPT-NeoX: fused attention and a plain feed-forward part."""
    layer, h, f = "gpt_neox.layers.{}.", config["hidden_size"], config["intermediate_size"]
    has_bias = bool(config.get("attention_bias"))
    parts = [
        norm(f"{layer}input_layernorm", h, has_bias=True),
        norm(f"{layer}post_attention_layernorm", h, has_bias=True),
        linear(f"{layer}attention.query_key_value", h, 3 * h, has_bias=has_bias),
        linear(f"{layer}attention.dense", h, h, has_bias=has_bias),
        linear(f"{layer}mlp.dense_h_to_4h", h, f, has_bias=True),
        linear(f"{layer}mlp.dense_4h_to_h", f, h, has_bias=True),
    ]
    return [
        embedding("gpt_neox.embed_in", config["vocab_size"], h),
        *in_layers(parts, range(config["num_hidden_layers"])),
        norm("gpt_neox.final_layer_norm", h, has_bias=True),
    ]


def list_falcon(config: Config) -> list[Part]:
    """Falcon: fused attention with few key-value heads, one or two norms a layer."""
    layer, h, heads = "transformer.h.{}.", config["hidden_size"], config["num_attention_heads"]
    f, size, has_bias = (
        config.get("intermediate_size") or 4 * h,
        h // heads,
        bool(config.get("bias")),
    )
    is_new = bool(config.get("new_decoder_architecture"))
    if is_new:
        fused = (2 * (config.get("num_kv_heads") or heads) + heads) * size
    else:
        fused = h + 2 * size if config["multi_query"] else 3 * h
    asked = config.get("num_ln_in_parallel_attn")
    num_norms = 2 if asked == 2 or (asked is None and is_new) else 1
    names = ("ln_attn", "ln_mlp") if num_norms == 2 else ("input_layernorm",)
    if not config["parallel_attn"]:
        names = ("input_layernorm", "post_attention_layernorm")
    parts = [
        linear(f"{layer}self_attention.query_key_value", h, fused, has_bias=has_bias),
        linear(f"{layer}self_attention.dense", h, h, has_bias=has_bias),
        linear(f"{layer}mlp.dense_h_to_4h", h, f, has_bias=has_bias),
        linear(f"{layer}mlp.dense_4h_to_h", f, h, has_bias=has_bias),
        *(norm(f"{layer}{name}", h, has_bias=True) for name in names),
    ]
    return [
        embedding("transformer.word_embeddings", config["vocab_size"], h),
        *in_layers(parts, range(config["num_hidden_layers"])),
        norm("transformer.ln_f", h, has_bias=True),
    ]


def list_bloom(config: Config) -> list[Part]:
    """BLOOM: fused attention, a norm after the embedding, no positions."""
    layer, h = "transformer.h.{}.", config["hidden_size"]
    parts = [
        norm(f"{layer}input_layernorm", h, has_bias=True),
        linear(f"{layer}self_attention.query_key_value", h, 3 * h, has_bias=True),
        linear(f"{layer}self_attention.dense", h, h, has_bias=True),
        norm(f"{layer}post_attention_layernorm", h, has_bias=True),
        linear(f"{layer}mlp.dense_h_to_4h", h, 4 * h, has_bias=True),
        linear(f"{layer}mlp.dense_4h_to_h", 4 * h, h, has_bias=True),
    ]
    return [
        embedding("transformer.word_embeddings", config["vocab_size"], h),
        norm("transformer.word_embeddings_layernorm", h, has_bias=True),
        *in_layers(parts, range(config["num_hidden_layers"])),
        norm("transformer.ln_f", h, has_bias=True),
    ]


def list_phi(config: Config) -> list[Part]:
    """Phi-1 and Phi-2: separate projections with biases, one norm a layer."""
    layer, h, f = "model.layers.{}.", config["hidden_size"], config["intermediate_size"]
    at, heads = f"{layer}self_attn.", config["num_attention_heads"]
    size = config.get("head_dim") or h // heads
    q, kv = heads * size, (config.get("num_key_value_heads") or heads) * size
    parts = [
        linear(f"{at}q_proj", h, q, has_bias=True),
        linear(f"{at}k_proj", h, kv, has_bias=True),
        linear(f"{at}v_proj", h, kv, has_bias=True),
        linear(f"{at}dense", q, h, has_bias=True),
        linear(f"{layer}mlp.fc1", h, f, has_bias=True),
        linear(f"{layer}mlp.fc2", f, h, has_bias=True),
        norm(f"{layer}input_layernorm", h, has_bias=True),
    ]
    if config.get("qk_layernorm"):
        parts += [norm(f"{at}{x}_layernorm", h // heads, has_bias=True) for x in "qk"]
    return [
        embedding("model.embed_tokens", config["vocab_size"], h),
        *in_layers(parts, range(config["num_hidden_layers"])),
        norm("model.final_layernorm", h, has_bias=True),
    ]


def list_opt(config: Config) -> list[Part]:
    """OPT: learned positions with two extra rows, and in OPT-350m a narrower embedding."""
    at, h, f = "model.decoder.", config["hidden_size"], config["intermediate_size"]
    layer, narrow = f"{at}layers.{{}}.", config.get("word_embed_proj_dim") or h
    has_bias = bool(config["enable_bias"])
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    parts = [
        *(linear(f"{layer}self_attn.{name}", h, h, has_bias=has_bias) for name in names),
        linear(f"{layer}fc1", h, f, has_bias=has_bias),
        linear(f"{layer}fc2", f, h, has_bias=has_bias),
    ]
    norms = [norm(f"{layer}{x}_layer_norm", h, has_bias=True) for x in ("self_attn", "final")]
    last = [norm(f"{at}final_layer_norm", h, has_bias=True)]
    if not config["do_layer_norm_before"] or config.get("_remove_final_layer_norm"):
        last = []
    if not config["layer_norm_elementwise_affine"]:
        norms, last = [], []
    projections = [
        linear(f"{at}project_in", narrow, h),
        linear(f"{at}project_out", h, narrow),
    ]
    return [
        embedding(f"{at}embed_tokens", config["vocab_size"], narrow),
        embedding(f"{at}embed_positions", config["max_position_embeddings"] + 2, h),
        *(projections if narrow != h else ()),
        *in_layers([*parts, *norms], range(config["num_hidden_layers"])),
        *last,
    ]
