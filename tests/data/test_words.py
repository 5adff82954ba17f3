"""Ids put together from known words are those of the whole text, and so is where they stand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lorakeet.data.words import WordMemory, is_word_wise, memory_of

ODD = ["a  b\n c\u0301 d \u00a0e", " x", "x ", "\n\n x\ty", "  ", "", "\0 a \0b", "文 a 1",
       "<|im_end|> a<|im_start|>b", "It's 3 's ' s 12 3.5 é e\u0301 -",
       "\u200b a\u200d b"]  # fmt: skip
PIECES = ["a", "Word", " ", "\n", "\t", "'s", "12", ".", "é", "\u0301", "文", "\u200d",
          "<|im_end|>", "\u00a0", "-", "_", "\0"]  # fmt: skip


@pytest.fixture(scope="module", params=["smollm2-135m-instruct", "qwen2.5", "minimind"])
def tokenizer(request, shared):
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / request.param)


def test_texts_of_any_characters_are_as_when_encoded_whole(tokenizer):
    assert is_word_wise(tokenizer)
    memory = WordMemory(tokenizer)

    def check(texts):
        tokenizer("")
        whole = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        for text, one, found in zip(texts, whole, memory.encode(texts), strict=True):
            ids, offsets = found
            assert ids.tolist() == one.ids
            assert list(map(tuple, offsets.tolist())) == one.offsets

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), max_size=4))
    def check_drawn(texts):
        check(texts)

    check(ODD)
    check_drawn()


def test_a_tokenizer_that_joins_words_is_encoded_whole(shared):
    joined = AutoTokenizer.from_pretrained(shared / "models" / "tinyllama-stories-260k")
    assert memory_of(joined) is None


def test_a_memory_that_is_wrong_is_found_out_by_the_first_texts(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "minimind")
    memory = WordMemory(tokenizer)
    memory._learn({"word"})
    memory._ids[:] = 7
    assert memory.encode(["a word"]) is None and memory.encode(["fine"]) is None


def test_a_full_memory_starts_again(shared, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "minimind")
    monkeypatch.setattr("lorakeet.data.words.MAX_WORDS", 3)
    memory = WordMemory(tokenizer)
    for text in ("one two three four five", "five six", "seven"):
        ((ids, _),) = memory.encode([text])
        assert ids.tolist() == tokenizer(text)["input_ids"]
    assert len(memory._numbers) <= 3
