"""Questions with known answers, asked by generation and compared with what was expected.

Accuracy is the share of exact matches.  A chat model that was never tuned often
knows the answer and wraps it in a sentence, so the share of answers that contain
the expected one stands beside it: a gain in the first alone is a gain in form.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lorakeet.base.errors import RequestError
from lorakeet.base.records import Question
from lorakeet.data.order import split_micro_batches
from lorakeet.evaluate.text_match import is_contained, is_exact, rouge_l, token_f1
from lorakeet.infer.generate import generate, read_window
from lorakeet.infer.prompts import encode_prompt
from lorakeet.infer.sampling import SamplingSettings

MAX_BATCH_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """One question with its answer.

    Args:
        origin: file and line of the question.
        is_contained: the expected answer stands somewhere in what the model wrote.
        f1, rouge_l: 0 to 1.
    """

    question: str
    expected: str
    got: str
    group: str
    origin: str
    is_correct: bool
    is_contained: bool
    f1: float
    rouge_l: float


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """The means of one group of questions."""

    num_questions: int
    num_correct: int
    accuracy: float
    f1: float


@dataclass(frozen=True, kw_only=True)
class AnswerReport:
    """All questions together, by group and one by one.

    Args:
        accuracy, contained, f1, rouge_l: means over all questions, 0 to 1.
        rows: the wrong ones first, each part in file order.
    """

    num_questions: int
    num_correct: int
    accuracy: float
    contained: float
    f1: float
    rouge_l: float
    by_group: dict[str, GroupScore]
    rows: tuple[AnswerRow, ...]


def score_answers(
    model: Any, tokenizer: Any, questions: Sequence[Question], settings: SamplingSettings
) -> AnswerReport:
    """Asks every question and compares the answers.

    Args:
        settings: greedy by default, which makes the score repeatable.

    Raises:
        RequestError: there is no question, or one does not fit the model's window or
            its template; the message names file and line.

    Cost: one generation a question, in batches of similar length.
    """
    prompts = [_encode_question(tokenizer, question) for question in questions]
    window = read_window(model)
    for question, prompt in zip(questions, prompts, strict=True):
        if len(prompt) >= window:
            raise RequestError(
                f"{question.origin}: the question has {len(prompt)} tokens and the model's window "
                f"is {window}, so no token is left for an answer. Shorten or remove it."
            )
    texts = [""] * len(prompts)
    lengths = [len(prompt) + settings.max_new_tokens for prompt in prompts]
    for places in split_micro_batches(lengths, MAX_BATCH_TOKENS):
        done = generate(model, tokenizer, [prompts[place] for place in places], settings)
        for place, completion in zip(places, done, strict=True):
            texts[place] = completion.text
    return build_answer_report(
        compare_answer(question, text) for question, text in zip(questions, texts, strict=True)
    )


def compare_answer(question: Question, got: str) -> AnswerRow:
    """One answer, compared in every way."""
    return AnswerRow(
        question=question.turns[-1].content,
        expected=question.answer,
        got=got,
        group=question.group,
        origin=str(question.origin),
        is_correct=is_exact(got, question.answer),
        is_contained=is_contained(got, question.answer),
        f1=token_f1(got, question.answer),
        rouge_l=rouge_l(got, question.answer),
    )


def build_answer_report(rows: Iterable[AnswerRow]) -> AnswerReport:
    """The means over compared answers.

    Raises:
        RequestError: there is no row.
    """
    rows = list(rows)
    if not rows:
        raise RequestError("There is no question to ask. Give a file with at least one.")
    groups: dict[str, list[AnswerRow]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    return AnswerReport(
        num_questions=len(rows),
        num_correct=sum(row.is_correct for row in rows),
        accuracy=_mean(row.is_correct for row in rows),
        contained=_mean(row.is_contained for row in rows),
        f1=_mean(row.f1 for row in rows),
        rouge_l=_mean(row.rouge_l for row in rows),
        by_group={name: _score_group(part) for name, part in sorted(groups.items())},
        rows=tuple(sorted(rows, key=lambda row: row.is_correct)),
    )


def _encode_question(tokenizer: Any, question: Question) -> list[int]:
    try:
        return encode_prompt(tokenizer, question.turns)
    except RequestError as error:
        raise RequestError(f"{question.origin}: {error}") from error


def _score_group(rows: Sequence[AnswerRow]) -> GroupScore:
    return GroupScore(
        num_questions=len(rows),
        num_correct=sum(row.is_correct for row in rows),
        accuracy=_mean(row.is_correct for row in rows),
        f1=_mean(row.f1 for row in rows),
    )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
