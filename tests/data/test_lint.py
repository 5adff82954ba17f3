import json

import numpy as np

from lorakeet.base.records import (
    Conversation,
    DroppedRow,
    EncodedSample,
    LabelledText,
    Origin,
    Passage,
    Turn,
)
from lorakeet.data.lint import DataLinter
from lorakeet.data.scripts import main_script


def at(line, path="a.jsonl"):
    return Origin(path=path, line=line)


def dropped(line, code):
    return DroppedRow(origin=at(line), code=code, reason="It is so.")


def encoded(num_tokens, num_trained):
    mask = np.zeros(num_tokens, bool)
    mask[num_tokens - num_trained :] = True
    return EncodedSample(ids=np.zeros(num_tokens, np.int32), mask=mask, origin=at(1))


def labelled(text, label, line=1):
    return LabelledText(text=text, label=label, origin=at(line))


def warnings_of(linter):
    return " ".join(linter.to_report()["warnings"])


def test_every_row_is_counted_once():
    linter = DataLinter()
    for line in range(60):
        linter.add_sample(Passage(text="An English text.", origin=at(line)), "text")
        linter.add_encoded(encoded(10 + line, 5))
    linter.add_dropped(dropped(61, "empty-answer"))
    linter.add_dropped(dropped(5, "cut"))
    report = linter.to_report()
    assert (report["num_rows"], report["num_samples"]) == (61, 60)
    assert (report["num_dropped"], report["num_cut"]) == (1, 1)
    assert report["schemas"] == {"text": 60}
    assert report["sources"] == {"a.jsonl": {"samples": 60, "dropped": 1}}
    assert report["dropped"]["empty-answer"]["example"] == "a.jsonl line 61: It is so."
    assert report["languages"] == {"latin": 1.0}
    tokens = report["tokens"]
    assert tokens["total"] == sum(range(10, 70)) and tokens["trained"] == 300
    assert (tokens["min"], tokens["median"], tokens["max"]) == (10, 39, 69)
    assert sum(part["rows"] for part in tokens["histogram"]) == 60
    assert tokens["histogram"][0] == {"from_tokens": 1, "to_tokens": 32, "rows": 23}
    json.dumps(report, allow_nan=False)


def test_an_empty_report_says_that_nothing_became_a_sample():
    report = DataLinter().to_report()
    assert report["num_samples"] == 0 and "No row became a sample" in report["warnings"][0]
    json.dumps(report, allow_nan=False)


def test_trouble_is_said_in_plain_words():
    linter = DataLinter()
    turns = (Turn(role="user", content="问题在这里"), Turn(role="assistant", content="回答"))
    for line in range(10):
        linter.add_sample(Conversation(turns=turns, origin=at(line)), "messages")
        linter.add_sample(Passage(text="Some English words.", origin=at(line)), "text")
        linter.add_encoded(encoded(100, 1))
        linter.add_encoded(encoded(90, 1))
    linter.add_sample(Conversation(turns=(*turns, turns[0]), origin=at(11)), "messages")
    linter.add_encoded(encoded(5000, 1))
    for line in range(8):
        linter.add_dropped(dropped(line, "duplicate"))
    linter.add_masked({"email": 3})
    said = warnings_of(linter)
    for part in ("only 21 samples", "8 of 29 rows (27.6 %)", "repeat an earlier one",
                 "longest sample has 5,000", "mix scripts: chinese", "an assistant turn: 1.",
                 "tokens are trained", "masked: 3 email"):  # fmt: skip
        assert part in said, part


def test_good_data_has_no_warnings():
    linter = DataLinter()
    for line in range(100):
        linter.add_sample(labelled(f"text number {line}", "ab"[line % 2]), "text-label")
        linter.add_encoded(encoded(20, 0))
    assert linter.to_report()["warnings"] == []


def test_label_trouble_is_found():
    linter = DataLinter()
    for line in range(100):
        linter.add_sample(labelled(f"text {line}", "common"), "text-label")
    linter.add_sample(labelled("text 5", "rare"), "text-label")
    report = linter.to_report()
    assert report["labels"] == {"common": 100, "rare": 1} and report["num_label_conflicts"] == 1
    said = " ".join(report["warnings"])
    assert "'common' has 100 rows and 'rare' only 1" in said
    assert "under another label" in said and "fewer than 8 rows: 'rare' (1 in all)" in said


def test_a_single_label_cannot_be_learned():
    linter = DataLinter()
    for line in range(60):
        linter.add_sample(labelled(f"text {line}", "x"), "text-label")
    assert "nothing to tell apart" in warnings_of(linter)


def test_scripts_are_told_apart():
    for text, script in [
        ("Plain words", "latin"),
        ("合同法的规定 (contract)", "chinese"),
        ("これはペンです", "japanese"),
        ("한국어 문장입니다", "korean"),
        ("Русский текст", "cyrillic"),
        ("نص عربي", "arabic"),
        ("1 + 1 = 2", "other"),
        ("", "other"),
    ]:
        assert main_script(text) == script, text
