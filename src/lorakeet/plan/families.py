"""The table of known architectures: what each is made of, with which head for which task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorakeet.plan import decoders, encoders
from lorakeet.plan.model_config import Config
from lorakeet.plan.parts import Part, head

CLASS_HEADS = ("score", "classifier", "pre_classifier")  # trained and saved in task classify


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to list the parts of a model.

    Args:
        body: everything but the heads.
        language_head: None where transformers has no language model of this family.
    """

    body: Callable[[Config], list[Part]]
    language_head: Callable[[Config], list[Part]] | None
    class_head: Callable[[Config, int], list[Part]]
    is_decoder: bool = True


def list_parts(config: Config, num_labels: int | None) -> list[Part]:
    """All parts of a known architecture.

    Args:
        num_labels: rows of the classification head; None for a language model.
    """
    family = FAMILIES[config["model_type"]]
    parts = family.body(config)
    if num_labels is not None:
        return [*parts, *family.class_head(config, num_labels)]
    return [*parts, *(family.language_head(config) if family.language_head else ())]


def _lm_head(config: Config) -> list[Part]:
    """One matrix from hidden states to logits; Phi gives it a bias."""
    width = config.get("word_embed_proj_dim") or config["hidden_size"]
    is_tied = bool(config.get("tie_word_embeddings"))
    has_bias = config["model_type"] == "phi"
    return [head("lm_head", width, config["vocab_size"], has_bias=has_bias, is_tied=is_tied)]


def _score(config: Config, num_labels: int) -> list[Part]:
    width = config.get("word_embed_proj_dim") or config["hidden_size"]
    return [head("score", width, num_labels)]


def _decoder(body: Callable[[Config], list[Part]]) -> Family:
    return Family(body=body, language_head=_lm_head, class_head=_score)


def _encoder(body: Callable[[Config], list[Part]], *, has_language_head: bool) -> Family:
    return Family(
        body=body, language_head=encoders.list_language_head if has_language_head else None,
        class_head=encoders.list_class_head, is_decoder=False,
    )  # fmt: skip


_GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_GATED, _decoder(decoders.list_gated)),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _decoder(decoders.list_experts)),
    "phi3": _decoder(decoders.list_phi3),
    "phi": _decoder(decoders.list_phi),
    "gpt2": _decoder(decoders.list_gpt2),
    "gpt_neox": _decoder(decoders.list_neox),
    "falcon": _decoder(decoders.list_falcon),
    "bloom": _decoder(decoders.list_bloom),
    "opt": _decoder(decoders.list_opt),
    **dict.fromkeys(
        ("bert", "roberta", "electra"), _encoder(encoders.list_bert, has_language_head=True)
    ),
    "deberta-v2": _encoder(encoders.list_bert, has_language_head=False),
    "distilbert": _encoder(encoders.list_distilbert, has_language_head=False),
}
