"""Text comes out in whole characters and without stop strings, for every tokenizer."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from lorakeet.infer.text_stream import HALF_CHARACTER, TextStream

TEXTS = (
    "第四百六十九条 当事人订立合同,可以采用书面形式。",
    "emoji 👩‍🚀🚀 and naïve café",
    "two  spaces,\n\n\ttabs and 龘𠀀 rare characters",
    " leading space",
)


@pytest.mark.parametrize("name", ["minimind", "qwen2.5", "gpt2", "smollm2-135m-instruct"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(shared, name, text):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert not any(HALF_CHARACTER in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == text == stream.text


def test_sentencepiece_spaces_and_byte_tokens_survive(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer("Once upon a 时间 time", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert not any(HALF_CHARACTER in piece for piece in pieces)


def test_an_answer_cut_inside_a_character_ends_before_it(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    ids = tokenizer("ok 龘")["input_ids"]
    stream = TextStream(tokenizer)
    for token in ids[:-1]:
        stream.push(token)
    stream.flush()
    assert stream.text.rstrip() == "ok"


def test_a_stop_string_across_tokens_is_never_shown(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    stream = TextStream(tokenizer, ("\n\nUser:", "END"))
    pieces = [stream.push(t) for t in tokenizer("answer\n\nUse it.\n\nUser: more")["input_ids"]]
    assert stream.is_stopped
    assert "".join(pieces) + stream.flush() == "answer\n\nUse it."


def test_what_only_began_like_a_stop_string_is_given_at_the_end(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    stream = TextStream(tokenizer, ("###",))
    pieces = [stream.push(t) for t in tokenizer("a ##")["input_ids"]]
    assert "".join(pieces) == "a "
    assert stream.flush() == "##"
    assert stream.text == "a ##"
