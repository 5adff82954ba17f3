import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.base.errors import RequestError
from lorakeet.base.records import Turn
from lorakeet.serve.protocol import ChatRequest, TextRequest, read_body

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields):
    return read_body(ChatRequest, json.dumps({**HELLO, **fields}).encode())


def test_fields_that_clients_send_and_that_change_nothing_are_passed_over():
    asked = chat(
        n=1, user="u", store=False, metadata={}, tools=[], logprobs=False, logit_bias={},
        response_format={"type": "text"}, frequency_penalty=0.0, service_tier="auto",
    )  # fmt: skip
    assert asked.model == "m"


@pytest.mark.parametrize(
    "fields",
    [{"n": 2}, {"tools": [{"type": "function"}]}, {"logprobs": True}, {"logprobs": 1},
     {"frequency_penalty": 0.5}, {"response_format": {"type": "json_object"}},
     {"logit_bias": {"5": 1}}, {"chat_template": "{{ 1 }}"}, {"n": True}],
)  # fmt: skip
def test_options_that_would_change_the_answer_are_refused_by_name(fields):
    with pytest.raises(RequestError, match=next(iter(fields))):
        chat(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 3}, {"temperature": "1"}, {"top_p": 0}, {"max_tokens": 0}, {"stop": ""},
     {"stop": ["a"] * 17}, {"messages": []}, {"messages": "hi"}, {"model": ""}, {"seed": 1.5},
     {"messages": [{"role": "king", "content": "x"}]}],
)  # fmt: skip
def test_wrong_types_and_values_are_refused(fields):
    with pytest.raises(RequestError, match=next(iter(fields))):
        chat(**fields)


def test_all_mistakes_of_a_body_are_told_at_once():
    with pytest.raises(RequestError, match="max_tokens.*temperature"):
        chat(temperature=9, max_tokens=0)


def test_content_may_be_text_or_parts_and_developer_means_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(
        messages=[
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": parts},
        ]
    )
    turns = [message.to_turn() for message in asked.messages]
    assert turns == [Turn(role="system", content="be short"), Turn(role="user", content="ab")]


def test_both_names_of_the_answer_length_are_understood():
    assert chat(max_tokens=5).max_new_tokens == 5
    assert chat(max_completion_tokens=7, max_tokens=5).max_new_tokens == 7
    assert chat().max_new_tokens is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_prompts_are_text_or_ids_one_or_several(prompt, expected):
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    assert read_body(TextRequest, body).prompts == expected


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_bytes_that_are_no_request_raise_nothing_but_request_errors(body):
    with pytest.raises(RequestError):
        read_body(ChatRequest, body)
