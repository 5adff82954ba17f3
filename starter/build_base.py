"""Writes the tokenizer and the random-weight model that the starter's training begins from.

``python -m starter.build_base --corpus build/starter --out build/starter/base``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from starter.facts import RULES, asked_facts, chinese_sentences, english_sentences

VOCABULARY = 2560
SPECIALS = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def corpus_texts(folder: Path) -> Iterator[str]:
    """The roles, the words of the corpus, and the domain's documents so that their names stay short."""
    yield from ["system\n", "user\n", "assistant\n"] * 1000
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number >= 20_000:
                break
            row = json.loads(line)
            yield row.get("text") or "\n".join(m["content"] for m in row["messages"])
    for rule in RULES.values():
        yield english_sentences(rule)
        yield chinese_sentences(rule)
    for asked in asked_facts():
        if not asked.is_held_out:
            yield f"{asked.question}\n{asked.answer}"


def build_tokenizer(corpus: Path, out: Path) -> None:
    """A byte-level BPE tokenizer with single digits and a ChatML template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[\p{Han}，。？！：；、“”（）]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_texts(corpus), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        clean_up_tokenization_spaces=False, model_max_length=SHAPE["max_position_embeddings"],
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)


def build_model(out: Path, seed: int = 0) -> int:
    """Random weights of the starter's shape; returns the number of parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(out)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **SHAPE,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(out)
    return model.num_parameters()


def main() -> None:
    """Writes tokenizer and model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("build/starter"))
    parser.add_argument("--out", type=Path, default=Path("build/starter/base"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    build_tokenizer(arguments.corpus, arguments.out)
    print(f"{build_model(arguments.out):,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
