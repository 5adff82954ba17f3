"""The parts of each encoder family, with their heads, as transformers builds it."""

from __future__ import annotations

from lorakeet.plan.model_config import Config
from lorakeet.plan.parts import Part, embedding, head, in_layers, linear, norm

_PREFIX = {"deberta-v2": "deberta"}


def list_bert(config: Config) -> list[Part]:
    """BERT, RoBERTa, ELECTRA and DeBERTa-v2 without heads."""
    kind, h, f = config["model_type"], config["hidden_size"], config["intermediate_size"]
    at = _PREFIX.get(kind, kind) + "."
    layer = f"{at}encoder.layer.{{}}."
    q, k, v = ("query_proj", "key_proj", "value_proj") if kind == "deberta-v2" else (
        "query", "key", "value")  # fmt: skip
    inner = _attention_width(config)
    parts = [
        *(linear(f"{layer}attention.self.{x}", h, inner, has_bias=True) for x in (q, k, v)),
        linear(f"{layer}attention.output.dense", h, h, has_bias=True),
        norm(f"{layer}attention.output.LayerNorm", h, has_bias=True),
        linear(f"{layer}intermediate.dense", h, f, has_bias=True),
        linear(f"{layer}output.dense", f, h, has_bias=True),
        norm(f"{layer}output.LayerNorm", h, has_bias=True),
    ]
    extra = _relative_parts(config, at, layer) if kind == "deberta-v2" else ([], [])
    numbers = range(config["num_hidden_layers"])
    return [*_embeddings(config, at), *in_layers([*parts, *extra[0]], numbers), *extra[1]]


def _attention_width(config: Config) -> int:
    """The width of q, k and v; DeBERTa-v2 may give the size of a head."""
    h, heads = config["hidden_size"], config["num_attention_heads"]
    if config["model_type"] == "deberta-v2":
        return (config.get("attention_head_size") or h // heads) * heads
    return h


def _embeddings(config: Config, at: str) -> list[Part]:
    """Words, positions, types and a norm; ELECTRA and DeBERTa-v2 may widen a narrow table."""
    kind, h = config["model_type"], config["hidden_size"]
    is_deberta = kind == "deberta-v2"
    width = _embedding_width(config)
    tables = {"word": config["vocab_size"], "token_type": config["type_vocab_size"]}
    if not is_deberta or config["position_biased_input"]:
        tables["position"] = config["max_position_embeddings"]
    parts = [
        embedding(f"{at}embeddings.{name}_embeddings", rows, width)
        for name, rows in tables.items()
        if rows
    ]
    parts.append(norm(f"{at}embeddings.LayerNorm", h if is_deberta else width, has_bias=True))
    if width != h and is_deberta:
        parts.append(linear(f"{at}embeddings.embed_proj", width, h))
    elif width != h:
        parts.append(linear(f"{at}embeddings_project", width, h, has_bias=True))
    return parts


def _embedding_width(config: Config) -> int:
    if config["model_type"] in ("electra", "deberta-v2"):
        return config.get("embedding_size") or config["hidden_size"]
    return config["hidden_size"]


def _relative_parts(config: Config, at: str, layer: str) -> tuple[list[Part], list[Part]]:
    """DeBERTa-v2's relative positions and convolution: parts of a layer, parts of the model."""
    h, inner, in_layer, once = config["hidden_size"], _attention_width(config), [], []
    asked = config.get("pos_att_type") or []
    kinds = [x.strip() for x in asked.lower().split("|")] if isinstance(asked, str) else asked
    if config.get("relative_attention"):
        span = config["max_relative_positions"]
        span = config["max_position_embeddings"] if span < 1 else span
        span = config["position_buckets"] if config["position_buckets"] > 0 else span
        once.append(embedding(f"{at}encoder.rel_embeddings", 2 * span, h))
        names = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
        if not config.get("share_att_key"):
            in_layer = [linear(f"{layer}attention.self.{name}", h, inner, has_bias=True)
                        for key, name in names.items() if key in kinds]  # fmt: skip
    if "layer_norm" in [x.strip() for x in (config.get("norm_rel_ebd") or "").lower().split("|")]:
        once.append(norm(f"{at}encoder.LayerNorm", h, has_bias=True))
    kernel = config.get("conv_kernel_size") or 0
    if kernel > 0:
        weights = h * (h // (config.get("conv_groups") or 1)) * kernel + h
        once.append(Part(path=f"{at}encoder.conv.conv", kind="norm", weights=weights))
        once.append(norm(f"{at}encoder.conv.LayerNorm", h, has_bias=True))
    return in_layer, once


def list_distilbert(config: Config) -> list[Part]:
    """DistilBERT without heads: BERT without token types, under other names."""
    at, h, f = "distilbert.", config["hidden_size"], config["intermediate_size"]
    layer = f"{at}transformer.layer.{{}}."
    names = ("q_lin", "k_lin", "v_lin", "out_lin")
    parts = [
        *(linear(f"{layer}attention.{name}", h, h, has_bias=True) for name in names),
        norm(f"{layer}sa_layer_norm", h, has_bias=True),
        linear(f"{layer}ffn.lin1", h, f, has_bias=True),
        linear(f"{layer}ffn.lin2", f, h, has_bias=True),
        norm(f"{layer}output_layer_norm", h, has_bias=True),
    ]
    return [
        embedding(f"{at}embeddings.word_embeddings", config["vocab_size"], h),
        embedding(f"{at}embeddings.position_embeddings", config["max_position_embeddings"], h),
        norm(f"{at}embeddings.LayerNorm", h, has_bias=True),
        *in_layers(parts, range(config["num_hidden_layers"])),
    ]


def list_language_head(config: Config) -> list[Part]:
    """The language head of BERT, RoBERTa and ELECTRA: a transform, then the decoder."""
    kind, h, v = config["model_type"], config["hidden_size"], config["vocab_size"]
    is_tied = bool(config["tie_word_embeddings"])
    if kind == "electra":
        width = _embedding_width(config)
        return [
            linear("generator_predictions.dense", h, width, has_bias=True),
            norm("generator_predictions.LayerNorm", width, has_bias=True),
            head("generator_lm_head", width, v, has_bias=True, is_tied=is_tied),
        ]
    names = {
        "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
                 "cls.predictions.decoder", "cls.predictions"),
        "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head"),
    }[kind]  # fmt: skip
    return [
        linear(names[0], h, h, has_bias=True),
        norm(names[1], h, has_bias=True),
        head(names[2], h, v, has_bias=not is_tied, is_tied=is_tied),
        norm(names[3], v),  # the bias, which a tied decoder takes from here
    ]


def list_class_head(config: Config, num_labels: int) -> list[Part]:
    """The classification head of each family, pooler included."""
    kind, h = config["model_type"], config["hidden_size"]
    if kind in ("roberta", "electra"):
        return [
            head("classifier.dense", h, h, has_bias=True),
            head("classifier.out_proj", h, num_labels, has_bias=True),
        ]
    if kind == "distilbert":
        first = head("pre_classifier", h, h, has_bias=True)
    elif kind == "bert":
        first = linear("bert.pooler.dense", h, h, has_bias=True)
    else:
        h = config.get("pooler_hidden_size") or h
        first = linear("pooler.dense", h, h, has_bias=True)
    return [first, head("classifier", h, num_labels, has_bias=True)]
