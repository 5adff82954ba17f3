"""Generation against transformers' own, on a real tiny model; stops, windows, cancelling."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lorakeet.base.errors import RequestError
from lorakeet.infer.generate import encode_prompt, generate, stop_token_ids
from lorakeet.infer.sampling import SamplingSettings

TEXTS = ("Once upon a time, there was a little girl", "Tom", "The big dog and the small cat ran to")


@pytest.fixture(scope="module")
def llama(tiny_llama):
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(
        tiny_llama
    )


def expected_tokens(model, prompt, num_tokens):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())


def test_greedy_tokens_equal_transformers_generate_for_prompts_of_different_length(llama):
    model, tokenizer = llama
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    done = generate(model, tokenizer, prompts, SamplingSettings(max_new_tokens=40))
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == expected_tokens(model, prompt, 40)
        assert completion.num_prompt_tokens == len(prompt)
        assert completion.num_completion_tokens == 40
        assert completion.finish_reason == "length"
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_rows_of_a_batch_end_at_their_own_time_and_do_not_disturb_the_others(llama):
    model, tokenizer = llama
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    limits = (3, 30, 11)
    settings = [SamplingSettings(max_new_tokens=n) for n in limits]
    done = generate(model, tokenizer, prompts, settings)
    for prompt, limit, completion in zip(prompts, limits, done, strict=True):
        assert completion.token_ids == expected_tokens(model, prompt, limit)


def test_learned_positions_are_right_under_left_padding(llama):
    _, tokenizer = llama
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    done = generate(model, tokenizer, prompts, SamplingSettings(max_new_tokens=12))
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == expected_tokens(model, prompt, len(completion.token_ids))


def test_streamed_pieces_join_to_the_text_and_stop_strings_end_it(llama):
    model, tokenizer = llama
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    whole = generate(model, tokenizer, prompts, SamplingSettings(max_new_tokens=40))
    stop = whole[0].text[10:14]
    pieces = {0: "", 1: ""}

    def listen(row, piece):
        pieces[row] += piece

    done = generate(
        model, tokenizer, prompts, SamplingSettings(max_new_tokens=40, stop=(stop,)), listen
    )
    assert done[0].text == whole[0].text[: whole[0].text.index(stop)]
    assert done[0].finish_reason == "stop"
    assert [pieces[0], pieces[1]] == [completion.text for completion in done]


def test_an_end_token_ends_the_answer_and_is_not_in_its_text(llama):
    model, tokenizer = llama
    prompt = tokenizer(TEXTS[0])["input_ids"]
    third = expected_tokens(model, prompt, 3)[2]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [2, third]
    try:
        done = generate(model, tokenizer, [prompt], SamplingSettings(max_new_tokens=9))[0]
    finally:
        model.generation_config.eos_token_id = before
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] == third
    assert done.text == tokenizer.decode(done.token_ids[:-1])


def test_a_prompt_that_fills_the_window_is_refused_with_both_numbers(llama):
    model, tokenizer = llama
    with pytest.raises(RequestError, match=r"512 tokens and the model's window is 512"):
        generate(model, tokenizer, [[5] * 512], SamplingSettings())
    with pytest.raises(RequestError, match="empty"):
        generate(model, tokenizer, [[]], SamplingSettings())
    with pytest.raises(RequestError, match="token 512"):
        generate(model, tokenizer, [[512]], SamplingSettings())


def test_new_tokens_end_at_the_window(llama):
    model, tokenizer = llama
    done = generate(model, tokenizer, [[5] * 508], SamplingSettings(max_new_tokens=50))[0]
    assert done.num_completion_tokens == 4
    assert done.finish_reason == "length"


def test_cancelling_ends_one_row_or_all(llama):
    model, tokenizer = llama
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    calls = []

    def cancel_first_then_all():
        calls.append(1)
        return {0} if len(calls) < 6 else True

    done = generate(
        model, tokenizer, prompts, SamplingSettings(max_new_tokens=40),
        cancelled=cancel_first_then_all,
    )  # fmt: skip
    assert [completion.finish_reason for completion in done] == ["cancelled", "cancelled"]
    assert [completion.num_completion_tokens for completion in done] == [0, 5]


def test_a_drawn_answer_depends_on_its_seed_not_on_its_neighbours(llama):
    model, tokenizer = llama
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    settings = SamplingSettings(temperature=1.0, top_p=0.9, top_k=50, max_new_tokens=20, seed=3)
    together = generate(model, tokenizer, prompts, settings)
    alone = [generate(model, tokenizer, [prompt], settings)[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    other = generate(
        model, tokenizer, prompts[:1],
        SamplingSettings(temperature=1.0, max_new_tokens=20, seed=4),
    )  # fmt: skip
    assert other[0].token_ids != together[0].token_ids


def test_the_training_mode_of_each_module_comes_back(llama):
    model, tokenizer = llama
    model.train()
    model.lm_head.eval()
    generate(model, tokenizer, [[1, 5]], SamplingSettings(max_new_tokens=2))
    assert model.training
    assert not model.lm_head.training
    model.eval()


def test_without_a_template_the_prompt_is_the_last_user_turn(llama):
    from lorakeet.base.records import Turn

    model, tokenizer = llama
    ids = encode_prompt(tokenizer, [Turn(role="user", content="Hi"),
                                    Turn(role="user", content=TEXTS[0])])  # fmt: skip
    assert ids == tokenizer(TEXTS[0])["input_ids"]
    assert stop_token_ids(model, tokenizer) == {2}
    with pytest.raises(RequestError, match="empty"):
        encode_prompt(tokenizer, [])
