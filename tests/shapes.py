"""Models of 18 families with sizes drawn by a seed, for comparisons on many configurations."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as t


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    layers: int
    is_tied: bool

    @property
    def usual(self) -> dict:
        """The names that most configurations share."""
        return {
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "vocab_size": 96,
            "num_attention_heads": self.heads, "max_position_embeddings": 64,
            "intermediate_size": self.mlp, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
        }  # fmt: skip

    @property
    def gated(self) -> dict:
        """Decoders with grouped keys and values."""
        return {
            **self.usual, "num_key_value_heads": self.kv_heads, "tie_word_embeddings": self.is_tied,
        }  # fmt: skip

    @property
    def deep(self) -> dict:
        """Decoders whose head has a width of its own."""
        return {**self.gated, "head_dim": 16}

    @property
    def labelled(self) -> dict:
        """Encoders with a classification head."""
        return {**self.usual, "num_labels": 3}


def _gpt2(s: Shape) -> torch.nn.Module:
    return t.GPT2LMHeadModel(t.GPT2Config(
        n_embd=s.hidden, n_layer=s.layers, n_head=s.heads, n_inner=s.mlp, vocab_size=96,
        n_positions=64, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


def _opt(s: Shape) -> torch.nn.Module:
    sizes = {k: v for k, v in s.usual.items() if k != "intermediate_size"}
    return t.OPTForCausalLM(
        t.OPTConfig(**sizes, ffn_dim=s.mlp, word_embed_proj_dim=s.hidden, dropout=0.0)
    )


def _bloom(s: Shape) -> torch.nn.Module:
    return t.BloomForCausalLM(t.BloomConfig(
        hidden_size=s.hidden, n_layer=s.layers, n_head=s.heads, vocab_size=96, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    ))  # fmt: skip


def _distilbert(s: Shape) -> torch.nn.Module:
    return t.DistilBertForSequenceClassification(t.DistilBertConfig(
        dim=s.hidden, n_layers=s.layers, n_heads=s.heads, hidden_dim=s.mlp, vocab_size=96,
        num_labels=3, max_position_embeddings=64, pad_token_id=0,
    ))  # fmt: skip


def _deberta(s: Shape) -> torch.nn.Module:
    return t.DebertaV2ForSequenceClassification(t.DebertaV2Config(
        **s.labelled, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_biased_input=s.is_tied,
    ))  # fmt: skip


def _t5(s: Shape) -> torch.nn.Module:
    return t.T5ForConditionalGeneration(t.T5Config(
        d_model=s.hidden, d_kv=16, d_ff=s.mlp, num_layers=s.layers, num_heads=s.heads,
        vocab_size=96, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu" if s.is_tied else "relu", tie_word_embeddings=s.is_tied,
    ))  # fmt: skip


FAMILIES: dict[str, Callable[[Shape], torch.nn.Module]] = {
    "llama": lambda s: t.LlamaForCausalLM(t.LlamaConfig(**s.gated, attention_bias=s.heads == 2)),
    "qwen2": lambda s: t.Qwen2ForCausalLM(t.Qwen2Config(**s.gated)),
    "qwen3": lambda s: t.Qwen3ForCausalLM(t.Qwen3Config(**s.deep)),
    "mistral": lambda s: t.MistralForCausalLM(t.MistralConfig(**s.deep)),
    "gpt2": _gpt2,
    "gpt-neox": lambda s: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**s.usual)),
    "falcon": lambda s: t.FalconForCausalLM(t.FalconConfig(
        hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        vocab_size=96, bias=s.is_tied, bos_token_id=1, eos_token_id=2,
    )),
    "gemma2": lambda s: t.Gemma2ForCausalLM(t.Gemma2Config(**s.deep)),
    "gemma3": lambda s: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**s.deep)),
    "phi3": lambda s: t.Phi3ForCausalLM(t.Phi3Config(**s.gated)),
    "opt": _opt,
    "bloom": _bloom,
    "bert": lambda s: t.BertForSequenceClassification(t.BertConfig(**s.labelled)),
    "roberta": lambda s: t.RobertaForSequenceClassification(t.RobertaConfig(**s.labelled)),
    "distilbert": _distilbert,
    "electra": lambda s: t.ElectraForSequenceClassification(
        t.ElectraConfig(**s.labelled, embedding_size=16)
    ),
    "deberta-v2": _deberta,
    "t5": _t5,
}  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert", "electra", "deberta-v2")


def draw_shape(rng: random.Random) -> Shape:
    """Sizes from 32 to 320; the widths are multiples of every number of heads."""
    heads = rng.choice([2, 4])
    return Shape(
        hidden=rng.choice([32, 64, 128, 256]), mlp=rng.choice([48, 96, 256, 320]), heads=heads,
        kv_heads=rng.choice([1, heads]), layers=rng.choice([1, 2]), is_tied=rng.random() < 0.4,
    )  # fmt: skip


def build_shaped(family: str, shape: Shape, seed: int) -> torch.nn.Module:
    """A model in evaluation mode whose biases and norms are random too, unlike fresh ones."""
    torch.manual_seed(seed)
    model = FAMILIES[family](shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def answer_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits; a model with a decoder of its own reads the same ids there."""
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids).logits
    return model(input_ids=ids).logits
