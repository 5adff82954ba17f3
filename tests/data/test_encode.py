"""Trained tokens are the assistant's words and their end tokens, whatever the template."""

import numpy as np
import pytest

from lorakeet.base.errors import DataError, RowError
from lorakeet.base.records import Conversation, LabelledText, Origin, Passage, Turn
from lorakeet.data.encode import encode_sample, explain
from lorakeet.data.render import find_trained_spans

HERE = Origin(path="rows.jsonl", line=7)
TURNS = (
    Turn(role="system", content="Be brief."),
    Turn(role="user", content="What is 2 + 2?"),
    Turn(role="assistant", content="It is 4."),
    Turn(role="user", content="再加一呢？"),
    Turn(role="assistant", content="等于 5。"),
)
END_OF = {
    "chatml.jinja": "<|im_end|>",
    "llama3.jinja": "<|eot_id|>",
    "llama3_2.jinja": "<|eot_id|>",
    "gemma.jinja": "<end_of_turn>",
    "phi3.jinja": "<|end|>",
    "qwen2_5_training.jinja": "<|im_end|>",
    "qwen3.jinja": "<|im_end|>",
}


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chat_tokenizer_folder)


def encode(turns, tokenizer, **options):
    sample = Conversation(turns=tuple(turns), origin=HERE)
    return encode_sample(sample, tokenizer, **{"max_tokens": 512, **options})


def trained_text(encoded, tokenizer):
    return [text for text, is_trained in explain(encoded, tokenizer) if is_trained]


@pytest.mark.parametrize("name", list(END_OF))
def test_every_template_trains_exactly_the_answers_and_their_end(name, shared, tokenizer):
    turns = TURNS[1:] if name == "gemma.jinja" else TURNS
    template = (shared / "tokenizers" / "chat_templates" / name).read_text()
    former, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        text, spans = find_trained_spans(turns, tokenizer)
        end = END_OF[name]
        assert [text[a:b] for a, b in spans] == [f"It is 4.{end}", f"等于 5。{end}"]
        encoded = encode(turns, tokenizer)
        joined = "".join(trained_text(encoded, tokenizer))
        assert "It is 4." in joined and "等于 5。" in joined
        assert "2 + 2" not in joined and "Be brief" not in joined and "再加一" not in joined
    finally:
        tokenizer.chat_template = former


def test_the_tokenizers_own_template_trains_all_turns_and_loses_nothing(tokenizer):
    encoded = encode(TURNS, tokenizer)
    assert trained_text(encoded, tokenizer) == ["It is 4.<|im_end|>", "等于 5。<|im_end|>"]
    whole = "".join(text for text, _ in explain(encoded, tokenizer))
    rendered = tokenizer.apply_chat_template(
        [{"role": t.role, "content": t.content} for t in TURNS], tokenize=False
    )
    assert whole == rendered
    assert not encoded.mask[0] and encoded.origin == HERE


def test_the_mask_does_not_depend_on_pad_being_the_end_token(tokenizer):
    usual = encode(TURNS, tokenizer)
    former = tokenizer.pad_token
    try:
        tokenizer.pad_token = tokenizer.eos_token
        assert np.array_equal(encode(TURNS, tokenizer).mask, usual.mask)
    finally:
        tokenizer.pad_token = former


def test_a_template_that_rewrites_answers_is_an_error_and_never_a_wrong_mask(tokenizer):
    former = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}\n{% endfor %}"
        )
        with pytest.raises(RowError, match="rewrites the assistant text"):
            encode(TURNS, tokenizer)
        tokenizer.chat_template = None
        with pytest.raises(DataError, match="no chat template"):
            encode(TURNS, tokenizer)
    finally:
        tokenizer.chat_template = former


def test_long_samples_are_refused_or_cut_and_without_a_target_they_are_refused(tokenizer):
    with pytest.raises(RowError, match="tokens, and the window") as caught:
        encode(TURNS, tokenizer, max_tokens=20)
    assert caught.value.code == "too-long"
    cut = len(encode(TURNS, tokenizer).ids) - 2
    assert len(encode(TURNS, tokenizer, max_tokens=cut, too_long="cut").ids) == cut
    with pytest.raises(RowError, match="no token of this sample"):
        encode(TURNS, tokenizer, max_tokens=9, too_long="cut")
    with pytest.raises(RowError, match="no token of this sample"):
        encode(TURNS[:2], tokenizer)


def test_a_passage_is_trained_whole_and_ends(tokenizer):
    passage = Passage(text="一段文字 and words.", origin=HERE)
    encoded = encode_sample(passage, tokenizer, max_tokens=64)
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert encoded.mask[1:].all() and not encoded.mask[0]


def test_a_label_is_an_index_and_an_unknown_one_is_refused(tokenizer):
    row = LabelledText(text="good", label="pos", origin=HERE)
    encoded = encode_sample(row, tokenizer, max_tokens=64, label_names=("neg", "pos"))
    assert encoded.label == 1 and not encoded.mask.any()
    with pytest.raises(RowError, match="'pos' is none of"):
        encode_sample(row, tokenizer, max_tokens=64, label_names=("a", "b"))
