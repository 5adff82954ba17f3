"""Chat prompts and stop tokens from templates that models really have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from lorakeet.base.errors import RequestError
from lorakeet.base.records import Turn
from lorakeet.infer.prompts import encode_prompt, find_end_of_turn_id, stop_token_ids

QUESTION = (Turn(role="user", content="合同何时成立?"),)


@pytest.fixture(scope="module")
def chat_tokenizer(chat_tokenizer_folder):
    return AutoTokenizer.from_pretrained(chat_tokenizer_folder)


def with_template(tokenizer, shared, name):
    folder = shared / "tokenizers" / "chat_templates"
    tokenizer.chat_template = (folder / f"{name}.jinja").read_text()
    return tokenizer


def test_a_chat_prompt_ends_where_the_assistant_begins(chat_tokenizer):
    text = chat_tokenizer.decode(encode_prompt(chat_tokenizer, QUESTION))
    assert "合同何时成立?<|im_end|>" in text
    assert text.rpartition("<|im_start|>")[2].startswith("assistant\n")


@pytest.mark.parametrize(("name", "token"), [("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>"),
                                             ("llama3", "<|eot_id|>"), ("phi3", "<|end|>"),
                                             ("qwen3", "<|im_end|>")])  # fmt: skip
def test_the_end_of_turn_is_found_from_the_template(chat_tokenizer_folder, shared, name, token):
    tokenizer = with_template(AutoTokenizer.from_pretrained(chat_tokenizer_folder), shared, name)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    assert find_end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(token)


def test_stop_tokens_join_all_sources(chat_tokenizer):
    model = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=7),
        generation_config=SimpleNamespace(eos_token_id=[7, 9]),
    )
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(model, chat_tokenizer) == {7, 9, end, chat_tokenizer.eos_token_id}


def test_a_refused_conversation_names_its_roles(chat_tokenizer_folder, shared):
    tokenizer = with_template(AutoTokenizer.from_pretrained(chat_tokenizer_folder), shared, "gemma")
    with pytest.raises(RequestError, match="system, user"):
        encode_prompt(tokenizer, [Turn(role="system", content="Be brief."), *QUESTION])
