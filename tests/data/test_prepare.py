"""The data stage keeps every good row and tells of every other."""

import json

import pytest

from lorakeet.base.errors import DataError
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.data.prepare import prepare_data
from lorakeet.data.show import render_sources


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chat_tokenizer_folder)


def ask(number):
    return {"instruction": f"Question number {number}?", "output": f"Answer {number}."}


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def prepare(folder, tokenizer, train, **data):
    recipe = recipe_from_dict(
        {"base": "b", "task": data.pop("task", "chat"), "data": {"train": train, **data}}
    )
    events = []
    prepared = prepare_data(
        recipe, tokenizer, folder / "data", lambda kind, **f: events.append((kind, f))
    )
    return prepared, events


def test_every_row_arrives_or_is_told_with_file_line_and_reason(tmp_path, tokenizer):
    rows = [ask(1), "{broken", ask(1), {"instruction": "x", "output": ""}, {"foo": 1},
            ask(2), {"instruction": "long", "output": "word " * 900}]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", rows)
    prepared, events = prepare(tmp_path, tokenizer, path, max_tokens=256, validation=0.0)
    assert len(prepared.train) == 2 and len(prepared.validation) == 0
    told = [json.loads(line) for line in (tmp_path / "data" / "dropped.jsonl").open()]
    assert {(row["line"], row["code"]) for row in told} == {
        (2, "bad-json"), (3, "duplicate"), (4, "empty-answer"), (5, "unknown-schema"),
        (7, "too-long"),
    }  # fmt: skip
    assert all(row["file"] == path and row["reason"] for row in told)
    assert [kind for kind, _ in events] == ["data_report"]
    assert [prepared.train[i].origin.line for i in range(2)] == [1, 6]


def test_the_split_follows_the_content_and_not_the_order(tmp_path, tokenizer):
    rows = [ask(n) for n in range(200)]
    chosen = []
    for number, listed in enumerate((rows, rows[::-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepared, _ = prepare(folder, tokenizer, write(folder / "r.jsonl", listed), validation=0.1)
        held = prepared.validation
        chosen.append({tuple(held[i].ids) for i in range(len(held))})
        assert len(prepared.train) + len(held) == 200
    assert chosen[0] == chosen[1] and 8 <= len(chosen[0]) <= 35


def test_nothing_left_is_an_error_with_the_reasons(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"foo": 1}, {"foo": 2}])
    with pytest.raises(DataError, match="2 x unknown-schema"):
        prepare(tmp_path, tokenizer, path)


def test_the_same_inputs_are_not_read_twice_and_other_inputs_are(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [ask(n) for n in range(3)])
    prepare(tmp_path, tokenizer, path, validation=0.0)
    _, events = prepare(tmp_path, tokenizer, path, validation=0.0)
    assert events == []
    write(tmp_path / "rows.jsonl", [ask(n) for n in range(4)])
    prepared, events = prepare(tmp_path, tokenizer, path, validation=0.0)
    assert len(prepared.train) == 4 and events


def test_labels_are_found_or_checked(tmp_path, tokenizer):
    rows = [{"text": f"text {n}", "label": n % 3} for n in range(9)]
    path = write(tmp_path / "rows.jsonl", rows)
    prepared, _ = prepare(tmp_path, tokenizer, path, task="classify", validation=0.0)
    assert prepared.label_names == ("0", "1", "2")
    assert sorted(prepared.train.labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    one = write(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}])
    with pytest.raises(DataError, match="1 different labels"):
        prepare(tmp_path, tokenizer, one, task="classify")


def test_shown_samples_mark_what_is_trained(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [ask(1)])
    recipe = recipe_from_dict({"base": "b", "data": {"train": path}})
    ((title, text),) = render_sources(recipe, tokenizer, skip=0, count=5)
    assert "line 1" in title
    assert "⟦Answer 1.<|im_end|>⟧" in text.plain


def test_a_guessed_encoding_is_told_in_the_report_and_the_event(tmp_path, tokenizer):
    rows = [json.dumps({"instruction": f"第{n}条合同的违约责任是什么", "output": "赔偿损失。"},
                       ensure_ascii=False) for n in range(30)]  # fmt: skip
    path = tmp_path / "old.jsonl"
    path.write_bytes("\n".join(rows).encode("gb18030"))
    good = write(tmp_path / "new.jsonl", [ask(n) for n in range(30)])
    prepared, ((_, event),) = prepare(tmp_path, tokenizer, [str(path), good])
    assert prepared.report["guessed_encodings"] == {str(path): "gb18030"}
    (told,) = [line for line in event["warnings"] if "not UTF-8" in line]
    assert told.startswith(str(path)) and "read as gb18030, which is a guess" in told
