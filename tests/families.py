"""Tiny models with random weights, one of each family, for tests that all must pass."""

from __future__ import annotations

import torch
import transformers as t

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
_GATED = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}

DECODERS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_GATED)),
    "llama-tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_GATED, tie_word_embeddings=True)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_GATED)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_GATED, head_dim=8)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_GATED)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    ),
    "gpt-neox": lambda: t.GPTNeoXForCausalLM(
        t.GPTNeoXConfig(**_SMALL, intermediate_size=64, max_position_embeddings=64)
    ),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**_SMALL)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**_GATED, head_dim=8)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_GATED, head_dim=8)),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**_SMALL, intermediate_size=64)),
}
_BERT = {**_SMALL, "intermediate_size": 64, "num_labels": 3, "max_position_embeddings": 64}
ENCODERS = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**_BERT)),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**_BERT)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(
            dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=96, num_labels=3
        )
    ),
}
ALL = {**DECODERS, **ENCODERS}


def build(family: str, seed: int = 0) -> torch.nn.Module:
    """A tiny model of a family in evaluation mode; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return ALL[family]().eval()


def some_ids(rows: int = 3, tokens: int = 12, seed: int = 1) -> torch.Tensor:
    """Token ids from 3 to 95."""
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))
