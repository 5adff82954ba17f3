import orjson
import pytest

from lorakeet.base.errors import DataError
from lorakeet.data.questions import read_questions


def write(path, *rows):
    path.write_bytes(b"\n".join(orjson.dumps(row) for row in rows))
    return str(path)


def test_questions_are_read_in_every_form(tmp_path):
    user, bot = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    system = {"role": "system", "content": "Count."}
    path = write(
        tmp_path / "q.jsonl",
        {"messages": [system, user], "answer": "4", "skill": "sums"},
        {"messages": [user], "answer": 4, "group": "sums"},
        {"messages": [user, bot]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"question": "2 + 2?", "answer": " 4 "},
        {"question": "2 + 2?", "choices": ["4", "5"], "answer": 0, "subject": "choice"},
    )
    questions = read_questions(path)
    assert [question.answer for question in questions] == ["4", "4", "4", "4", "4", "A"]
    assert [question.group for question in questions] == (
        ["sums", "sums", "all", "all", "all", "choice"]
    )
    assert all(question.turns[-1].role == "user" for question in questions)
    assert questions[0].turns[0].content == "Count."
    assert questions[5].turns[0].content == "2 + 2?\nA. 4\nB. 5"
    assert questions[5].origin.line == 6


def test_all_bad_questions_are_named_at_once(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"question": "good", "answer": "yes"},
        {"question": "no answer", "answer": ""},
        {"text": "no question"},
        {"messages": [], "answer": "x"},
        [1],
    )
    with pytest.raises(DataError) as caught:
        read_questions(path)
    said = str(caught.value)
    assert "4 rows are no question" in said
    assert all(f"q.jsonl line {line}: " in said for line in (2, 3, 4, 5))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_questions(str(tmp_path / "absent.jsonl"))


def test_a_real_exam_is_read(shared):
    questions = read_questions(str(shared / "data/zh_legal_disc/legal_exam_mcq.jsonl.gz"))
    assert len(questions) == 2563
    assert set("".join(question.answer for question in questions)) <= set("ABCDE")
