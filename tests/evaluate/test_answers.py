"""Answers, multiple choice and retention."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import combinations

import pytest
import torch

from lorakeet.base.errors import DataError, MismatchError, RequestError
from lorakeet.base.records import Origin, Question, Turn
from lorakeet.evaluate.answers import build_answer_report, compare_answer, score_answers
from lorakeet.evaluate.choice import LETTERS, read_choices, score_choices
from lorakeet.evaluate.retention import compare_reports, sign_test
from lorakeet.evaluate.text_match import is_exact, rouge_l, token_f1
from lorakeet.infer.sampling import SamplingSettings


def make_question(text, answer, line=1, group="all"):
    return Question(
        turns=(Turn(role="user", content=text),),
        answer=answer,
        group=group,
        origin=Origin(path="q.jsonl", line=line),
    )


@pytest.mark.parametrize(("got", "expected"), [
    ("  Yes. ", "yes"), ("１２３", "123"), ("合同成立。", "合同成立"),
    ("<think>a\nb</think>\n\nB", "B"), ("New  York!", "new york"),
])  # fmt: skip
def test_answers_that_a_reader_would_accept_are_exact(got, expected):
    assert is_exact(got, expected)


@pytest.mark.parametrize(("got", "expected"), [("12", "120"), ("-5", "5"), ("3.5", "35")])
def test_other_answers_are_not(got, expected):
    assert not is_exact(got, expected)


def test_rouge_equals_the_rouge_score_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    from lorakeet.evaluate.text_match import split_tokens

    class Tokens:
        def tokenize(self, text):
            return split_tokens(text)

    oracle = scorer.RougeScorer(["rougeL"], tokenizer=Tokens())
    texts = (
        "当事人订立合同,可以采用书面形式、口头形式。", "订立合同采用口头或者书面形式",
        "the contract is made in writing", "in writing the contract was made", "合同 made 成立",
    )  # fmt: skip
    for first, second in combinations(texts, 2):
        expected = oracle.score(second, first)["rougeL"].fmeasure
        assert rouge_l(first, second) == pytest.approx(expected)


def test_chinese_f1_counts_characters():
    assert token_f1("书面形式", "口头形式") == 0.5
    assert token_f1("", "x") == 0.0


def test_generated_answers_are_compared_in_file_order_with_the_wrong_ones_first(llama):
    model, tokenizer = llama
    texts = ("Once upon a time", "Tom", "The dog ran and ran until the")
    settings = SamplingSettings(max_new_tokens=6)
    first = score_answers(model, tokenizer, [make_question(t, "?") for t in texts], settings)
    known = {row.question: row.got for row in first.rows}
    questions = [
        make_question(text, known[text] if n != 1 else "no", n + 1, "even" if n % 2 else "odd")
        for n, text in enumerate(texts)
    ]
    report = score_answers(model, tokenizer, questions, settings)
    assert (report.num_correct, report.num_questions) == (2, 3)
    assert report.rows[0].origin == "q.jsonl line 2"
    assert report.by_group["even"].accuracy == 0.0
    assert report.by_group["odd"].accuracy == 1.0
    assert json.loads(json.dumps(asdict(report)))["rows"][0]["expected"] == "no"


def test_a_question_over_the_window_is_named_by_file_and_line(llama):
    model, tokenizer = llama
    long = make_question("word " * 600, "x", 7)
    with pytest.raises(RequestError, match=r"q.jsonl line 7: .*window is 512"):
        score_answers(model, tokenizer, [long], SamplingSettings())


def make_report(verdicts):
    return build_answer_report(
        compare_answer(make_question(f"q{n}", "yes", n, "ab"[n % 2]), "yes" if right else "no")
        for n, right in enumerate(verdicts)
    )


def test_a_loss_over_five_points_is_forgetting_with_a_remedy():
    base, tuned = make_report([True] * 20), make_report([True] * 18 + [False] * 2)
    result = compare_reports(asdict(base), tuned)
    assert result["verdict"] == "forgetting"
    assert result["points"] == -10.0
    assert "general rows" in result["remedy"]
    assert result["lost"][0]["tuned"] == "no"
    assert "90.0 % after (-10.0 points on 20 questions)" in result["summary"]
    assert result["by_group"]["a"]["points"] == -10.0
    assert json.dumps(result, allow_nan=False)


def test_a_small_loss_is_no_forgetting_and_other_questions_are_refused():
    base, tuned = make_report([True] * 20), make_report([True] * 19 + [False])
    assert compare_reports(base, tuned)["verdict"] == "kept"
    assert compare_reports(tuned, base)["remedy"] is None
    with pytest.raises(MismatchError, match="20 questions and the tuned model 3"):
        compare_reports(base, make_report([True] * 3))


def test_the_sign_test_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for lost, gained in ((9, 2), (1, 7), (4, 4), (30, 12)):
        expected = stats.binomtest(lost, lost + gained).pvalue
        assert sign_test(lost, gained) == pytest.approx(expected)


def test_mmlu_and_cmmlu_csv_and_json_rows_give_the_same_questions(tmp_path):
    (tmp_path / "law_test.csv").write_text('"When, then?",now,later,never,ever,C\n')
    (tmp_path / "med.csv").write_text(
        ',Question,A,B,C,D,Answer\n0,"When, then?",now,later,never,ever,C\n'
    )
    rows = [{"question": "When, then?", "choices": ["now", "later", "never", "ever"], "answer": a}
            for a in ("C", 2, "never")]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_choices(str(tmp_path)) + read_choices(str(tmp_path / "rows.jsonl"))
    assert [q.group for q in found] == ["law", "med", "all", "all", "all"]
    assert {(q.question, q.choices, q.answer) for q in found} == {
        ("When, then?", ("now", "later", "never", "ever"), 2)
    }


def test_an_answer_that_is_no_option_is_refused_with_its_line(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("Q?,a,b,c,d,A\nQ?,a,b,c,d,F\n")
    with pytest.raises(DataError, match=r"line 2: the answer 'F'"):
        read_choices(str(path))


def test_the_chosen_letter_is_the_likeliest_continuation(llama, tmp_path):
    model, tokenizer = llama
    path = tmp_path / "x_test.csv"
    path.write_text("One?,a,b,c,d,A\nTwo and more words?,e,f,B\nThree?,a,b,c,d,D\n")
    questions = read_choices(str(path))
    report = score_choices(model, tokenizer, questions, shots=questions[:1])
    for row, question in zip(sorted(report.rows, key=lambda r: r.origin), questions, strict=True):
        scores = []
        for letter in LETTERS[: len(question.choices)]:
            text = f"{questions[0].text}\nAnswer: A\n\n{row.question}\nAnswer: {letter}"
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                log_p = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
            num_same = len(tokenizer(text[:-2])["input_ids"])
            scores.append(float(log_p.gather(-1, ids[0, 1:, None])[num_same - 1 :].sum()))
        assert row.got[0] == LETTERS[scores.index(max(scores))]
    assert report.by_group["x"].num_questions == 3
