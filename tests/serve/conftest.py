"""A tiny random Llama with a real chat tokenizer, and two adapters that change its answers."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorakeet.adapters.attach import attach
from lorakeet.adapters.files import write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.models.load import load_model
from lorakeet.serve.http import start_background_server


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, chat_tokenizer_folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "tiny-chat"
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_root(tmp_path_factory, base_folder):
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("law", "med")):
        model, _ = load_model(str(base_folder))
        attach(model, Lora(rank=4, alpha=8), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3, generator=generator)
        write_adapter(model, root / name, base=str(base_folder))
    shutil.copytree(root / "med", root / "copy-of-med")
    return root


@pytest.fixture(scope="session")
def adapters(adapter_root):
    return {"law": adapter_root / "law", "med": adapter_root / "med"}


@pytest.fixture(scope="module")
def server(base_folder, adapters, adapter_root):
    with start_background_server(str(base_folder), adapters, adapter_root=adapter_root) as running:
        yield running
