import pytest

from lorakeet.base.errors import RowError
from lorakeet.base.recipe import DataSettings
from lorakeet.base.records import Conversation, LabelledText, Origin, Passage, RawRow
from lorakeet.data.schemas import schema_name, to_sample
from lorakeet.data.sources import read_rows

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def sample_of(fields, task="chat", **settings):
    row = RawRow(fields=fields, origin=Origin(path="a.jsonl", line=7))
    return to_sample(row, task=task, settings=DataSettings(train="a.jsonl", **settings))


def pairs_of(fields, **settings):
    return [(turn.role, turn.content) for turn in sample_of(fields, **settings).turns]


@pytest.mark.parametrize(
    ("fields", "name", "question", "answer"),
    [
        ({"messages": [USER, BOT]}, "messages", "Hi", "Hello"),
        ({"messages": '[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]'},
         "messages", "q", "a"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, BOT]},
         "messages", "q", "Hello"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         "sharegpt", "q", "a"),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, "alpaca", "Add\n\n1, 2", "3"),
        ({"instruction": "Say", "input": "", "output": "x"}, "alpaca", "Say", "x"),
        ({"instruction": "Say", "context": "c", "response": "x"}, "alpaca", "Say\n\nc", "x"),
        ({"Question": "q", "Answer": 4, "id": 1}, "question-answer", "q", "4"),
        ({"prompt": "p", "completion": "c", "text": None}, "prompt-completion", "p", "c"),
        ({"input": "q", "A": "x", "B": "y", "C": "z", "D": "w", "output": "B"},
         "multiple-choice", "q\nA. x\nB. y\nC. z\nD. w", "B"),
        ({"question": "q", "choices": ["x", "y"], "answer": 1},
         "multiple-choice", "q\nA. x\nB. y", "B"),
    ],
)  # fmt: skip
def test_a_conversation_schema_is_recognised(fields, name, question, answer):
    assert schema_name(fields) == name
    assert pairs_of(fields) == [("user", question), ("assistant", answer)]
    assert sample_of(fields).origin == Origin(path="a.jsonl", line=7)


def test_history_and_system_come_before_the_question():
    fields = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert [content for _, content in pairs_of(fields)] == ["s", "a", "b", "c", "d"]


def test_the_default_system_prompt_stands_where_there_is_none():
    assert pairs_of({"messages": [USER, BOT]}, system="Be kind.")[0] == ("system", "Be kind.")
    own = {"role": "system", "content": "Be brief."}
    assert pairs_of({"messages": [own, USER, BOT]}, system="Be kind.")[0][1] == "Be brief."


def test_tool_calls_and_thoughts_are_written_between_tags():
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": {"sum": 3}},
        {"role": "assistant", "content": "3", "reasoning_content": "easy"},
    ]
    turns = pairs_of({"messages": messages, "tools": [{"name": "add"}]})
    assert turns[0][0] == "system" and '<tools>\n[{"name":"add"}]\n</tools>' in turns[0][1]
    assert turns[2:] == [
        ("assistant", '<tool_call>\n{"name":"add","arguments":{"a":1}}\n</tool_call>'),
        ("tool", '{"sum":3}'),
        ("assistant", "<think>\neasy\n</think>\n\n3"),
    ]


def test_a_conversation_that_ends_with_the_user_is_kept():
    assert pairs_of({"messages": [USER, BOT, USER]})[-1] == ("user", "Hi")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"messages": [USER]}, "no-assistant-turn"),
        ({"messages": []}, "no-assistant-turn"),
        ({"messages": [USER, {"role": "assistant", "content": " \u200b"}]}, "empty-answer"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "empty-answer"),
        ({"messages": [USER, {"role": "narrator", "content": "x"}]}, "unknown-role"),
        ({"messages": [USER, "text"]}, "bad-turn"),
        ({"messages": "not a list"}, "bad-turn"),
        ({"messages": [USER, {**BOT, "loss_weight": 0.0}]}, "untrained-turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, BOT]},
         "unsupported-content"),
        ({"messages": [USER, BOT], "label": False}, "rejected-answer"),
        ({"instruction": "x", "output": ""}, "empty-answer"),
        ({"instruction": "x", "output": None}, "empty-answer"),
        ({"question": "", "answer": "x"}, "empty-question"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "unsupported-schema"),
        ({"text": "  "}, "empty-text"),
        ({"text": ["a"]}, "wrong-type"),
        ({"text": "x", "label": 1}, "wrong-task"),
    ],
)  # fmt: skip
def test_a_row_without_anything_to_train_on_says_why(fields, code):
    with pytest.raises(RowError) as caught:
        sample_of(fields)
    assert caught.value.code == code and caught.value.reason.endswith(".")


def test_unknown_fields_are_listed_with_the_known_schemas():
    assert schema_name({"foo": 1, "bar": 2}) == "unknown"
    with pytest.raises(RowError, match=r"foo, bar.*alpaca.*text_column") as caught:
        sample_of({"foo": 1, "bar": 2})
    assert caught.value.code == "unknown-schema"


def test_running_text_is_a_passage_for_chat_and_for_text():
    for task in ("chat", "text"):
        assert sample_of({"text": "A law."}, task).text == "A law."
    assert isinstance(sample_of({"text": "x", "label": "y"}, "text"), Passage)
    with pytest.raises(RowError, match="task: chat"):
        sample_of({"instruction": "x", "output": "y"}, "text")


@pytest.mark.parametrize(
    ("value", "label"), [(1, "1"), ("pos", "pos"), (0, "0"), (2.0, "2"), (True, "True")]
)
def test_labels_are_strings(value, label):
    sample = sample_of({"sentence": "x", "label": value}, "classify")
    assert isinstance(sample, LabelledText) and sample.label == label


def test_a_numbered_label_stands_for_its_name():
    labels = ("negative", "positive")
    assert sample_of({"text": "x", "label": 1}, "classify", labels=labels).label == "positive"
    assert sample_of({"text": "x", "label": "negative"}, "classify", labels=labels).label == (
        "negative"
    )
    with pytest.raises(RowError, match="none of data.labels"):
        sample_of({"text": "x", "label": "neutral"}, "classify", labels=labels)


def test_sentence_pairs_keep_both_sentences():
    fields = {"premise": "a", "hypothesis": "b", "label": 2}
    sample = sample_of(fields, "classify")
    assert (sample.text, sample.second_text, sample.label) == ("a", "b", "2")
    assert schema_name(fields) == "sentence-pair"


def test_a_row_without_label_is_refused_for_classification():
    with pytest.raises(RowError, match="label is empty"):
        sample_of({"text": "x", "label": ""}, "classify")
    with pytest.raises(RowError, match="needs a text and a label"):
        sample_of({"text": "x"}, "classify")


def test_named_columns_are_used_whatever_they_are_called():
    fields = {"body": "x", "kind": 3}
    named = {"text_column": "body", "label_column": "kind"}
    assert sample_of(fields, "classify", **named).label == "3"
    assert sample_of(fields, "text", text_column="BODY").text == "x"
    assert [turn.content for turn in sample_of(fields, **named).turns] == ["x", "3"]
    with pytest.raises(RowError, match=r"no column 'missing'; it has body, kind"):
        sample_of(fields, "text", text_column="missing")


@pytest.mark.parametrize(
    ("name", "schema", "num_rows"),
    [
        ("llamafactory_demo/alpaca_en_demo.json", "alpaca", 999),
        ("llamafactory_demo/alpaca_zh_demo.json", "alpaca", 1000),
        ("llamafactory_demo/glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("llamafactory_demo/reason_tool_use_demo_50.jsonl", "messages", 50),
        ("llamafactory_demo/v1_sft_demo.jsonl", "messages", 500),
        ("sharegpt_dummy/dummy_conversation.json", "sharegpt", 500),
        ("zh_legal_disc/legal_exam_mcq.jsonl.gz", "multiple-choice", 2563),
        ("zh_medical_dialogue/internal_medicine.jsonl.xz", "question-answer", 7644),
        ("dolly15k/dolly.jsonl.xz", "alpaca", 14996),
    ],
)
def test_real_files_become_conversations(shared, name, schema, num_rows):
    settings = DataSettings(train="x")
    samples, refused = [], []
    for row in read_rows(str(shared / "data" / name), refused.append):
        assert schema_name(row.fields) == schema
        try:
            samples.append(to_sample(row, task="chat", settings=settings))
        except RowError as error:
            refused.append(error)
    assert len(samples) == num_rows, [str(error) for error in refused[:3]]
    assert all(isinstance(sample, Conversation) for sample in samples)


def test_real_tool_calls_keep_their_roles(shared):
    path = shared / "data/llamafactory_demo/glaive_toolcall_en_demo.json"
    rows = read_rows(str(path), lambda row: None)
    turns = to_sample(next(rows), task="chat", settings=DataSettings(train="x")).turns
    assert [turn.role for turn in turns[:6]] == [
        "system", "user", "assistant", "user", "assistant", "tool"
    ]  # fmt: skip
    assert "search_recipes" in turns[0].content
    assert turns[4].content.startswith('<tool_call>\n{"name": "search_recipes"')
