"""Multiple choice in the manner of MMLU and CMMLU: which option letter is likeliest?

    question, options A to D, "Answer:"  ->  logits of the next token  ->  best of A, B, C, D

Nothing is generated, so a model that would ramble is scored on what it knows.
One pass a question; ties go to the earlier letter.

Files: rows ``{"question", "choices", "answer"}`` with a letter, a number from 0
or the text of the option; MMLU's csv (question, A, B, C, D, letter; no header)
and CMMLU's csv (the same with a header and a number in front).
Source: arXiv:2009.03300 (MMLU), arXiv:2306.09212 (CMMLU).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.base.errors import DataError, RequestError
from lorakeet.base.records import DroppedRow, Origin, Turn
from lorakeet.data.order import split_micro_batches
from lorakeet.data.sources import read_rows
from lorakeet.evaluate.answers import AnswerReport, AnswerRow, build_answer_report
from lorakeet.infer.decoder import Decoder
from lorakeet.infer.generate import read_window
from lorakeet.infer.mode import evaluation_mode
from lorakeet.infer.prompts import encode_prompt

LETTERS = "ABCDEFGHIJ"
MAX_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """A question with options; ``answer`` is the right one's place, from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int
    group: str
    origin: Origin

    @property
    def text(self) -> str:
        """The question and its lettered options, as the model reads them."""
        options = zip(LETTERS, self.choices, strict=False)
        return "\n".join([self.question, *(f"{letter}. {text}" for letter, text in options)])


def read_choices(path: str) -> list[ChoiceQuestion]:
    """All questions of a file, or of a folder of csv files (one subject each).

    Raises:
        DataError: a row is no question with options and an answer among them.
    """
    place = Path(path)
    files = sorted(place.glob("*.csv")) if place.is_dir() else [place]
    if files and all(file.suffix.lower() == ".csv" for file in files):
        return [question for file in files for question in _read_csv(file)]

    def refuse(row: DroppedRow) -> None:
        raise DataError(f"{row.origin}: {row.reason}")

    return [_to_choice(row.fields, row.origin) for row in read_rows(path, refuse)]


def score_choices(
    model: Any,
    tokenizer: Any,
    questions: Sequence[ChoiceQuestion],
    shots: Sequence[ChoiceQuestion] = (),
) -> AnswerReport:
    """The share of questions whose right letter is the likeliest next token.

    Args:
        shots: solved questions that stand before each one (five in MMLU's paper).

    Returns:
        a report of the same kind as for written answers, so that ``retention``
        compares either.

    Raises:
        RequestError: there is no question, or one does not fit the window.
    """
    encoded = [_encode(tokenizer, question, shots) for question in questions]
    window = read_window(model)
    for question, (prompt, options) in zip(questions, encoded, strict=True):
        num_tokens = len(prompt) + max(map(len, options))
        if num_tokens > window:
            raise RequestError(
                f"{question.origin}: the question has {num_tokens} tokens and the model's window "
                f"is {window}. Give fewer solved questions before it."
            )
    got = [0] * len(questions)
    lengths = [len(prompt) for prompt, _ in encoded]
    with evaluation_mode(model):
        for places in split_micro_batches(lengths, MAX_BATCH_TOKENS):
            logits_BV = Decoder(model).read_prompts([encoded[place][0] for place in places])
            for place, logits_V in zip(places, logits_BV, strict=True):
                got[place] = _choose(model, *encoded[place], logits_V)
    return build_answer_report(map(_to_row, questions, got))


def _choose(model: Any, prompt: list[int], options: list[list[int]], logits_V: Tensor) -> int:
    """The place of the likeliest option, from the next token's logits where one is enough."""
    if all(len(option) == 1 for option in options):
        return int(logits_V[[option[0] for option in options]].argmax())
    return _choose_longer(model, prompt, options)


def _encode(
    tokenizer: Any, question: ChoiceQuestion, shots: Sequence[ChoiceQuestion]
) -> tuple[list[int], list[list[int]]]:
    """The prompt's ids and the tokens that each letter continues it with."""
    solved = [f"{shot.text}\nAnswer: {LETTERS[shot.answer]}\n\n" for shot in shots]
    text = "".join(solved) + question.text + "\nAnswer:"
    letters = LETTERS[: len(question.choices)]
    if getattr(tokenizer, "chat_template", None):
        start = encode_prompt(tokenizer, [Turn(role="user", content=text)])
        whole = [start + tokenizer(a, add_special_tokens=False)["input_ids"] for a in letters]
    else:
        turns = [[Turn(role="user", content=f"{text} {letter}")] for letter in letters]
        whole = [encode_prompt(tokenizer, turn) for turn in turns]
    shared = 0
    while all(len(ids) > shared for ids in whole) and len({ids[shared] for ids in whole}) == 1:
        shared += 1
    return whole[0][:shared], [ids[shared:] for ids in whole]


def _choose_longer(model: Any, prompt: list[int], options: list[list[int]]) -> int:
    """The likeliest option where a letter takes several tokens: the sum of their logs."""
    scores = []
    for option in options:
        ids_1T = torch.tensor([prompt + option], device=model.device)
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, len(prompt) - 1 : -1]
        log_p_TV = torch.log_softmax(logits_TV.float(), dim=-1)
        scores.append(float(log_p_TV.gather(-1, ids_1T[0, len(prompt) :, None]).sum()))
    return scores.index(max(scores))


def _to_row(question: ChoiceQuestion, got: int) -> AnswerRow:
    is_correct = got == question.answer
    return AnswerRow(
        question=question.text,
        expected=f"{LETTERS[question.answer]}. {question.choices[question.answer]}",
        got=f"{LETTERS[got]}. {question.choices[got]}",
        group=question.group,
        origin=str(question.origin),
        is_correct=is_correct,
        is_contained=is_correct,
        f1=float(is_correct),
        rouge_l=float(is_correct),
    )


def _read_csv(path: Path) -> list[ChoiceQuestion]:
    """MMLU's or CMMLU's layout; the subject is the file's name."""
    group = path.stem
    for ending in ("_test", "_dev", "_val"):
        group = group.removesuffix(ending)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    if rows and "question" in [cell.strip().lower() for cell in rows[0]]:
        first = [cell.strip().lower() for cell in rows[0]].index("question")
        body = [(number, row[first:]) for number, row in enumerate(rows[1:], 2)]
    else:
        body = list(enumerate(rows, 1))
    questions = []
    for number, row in body:
        origin = Origin(path=str(path), line=number)
        if len(row) < 4:
            raise DataError(
                f"{origin}: the row has {len(row)} columns; needed are the question, at least "
                "two options and the letter of the answer."
            )
        fields = {"question": row[0], "choices": row[1:-1], "answer": row[-1], "group": group}
        questions.append(_to_choice(fields, origin))
    return questions


def _to_choice(fields: dict[str, Any], origin: Origin) -> ChoiceQuestion:
    """A row's fields as a question.

    Raises:
        DataError: something is missing, or the answer is none of the options.
    """
    named = {str(name).lower(): value for name, value in fields.items()}
    choices = named.get("choices") or named.get("options") or []
    if isinstance(choices, dict):
        choices = list(choices.values())
    question, answer = str(named.get("question", "")).strip(), named.get("answer")
    if not question or not 2 <= len(choices) <= len(LETTERS) or answer is None:
        raise DataError(
            f"{origin}: the row has the fields {', '.join(map(str, fields))}; needed are "
            'a "question", 2 to 10 "choices" and an "answer".'
        )
    texts = tuple(str(choice).strip() for choice in choices)
    group = next((str(named[n]) for n in ("group", "subject", "category") if named.get(n)), "all")
    return ChoiceQuestion(
        question=question,
        choices=texts,
        answer=_to_place(answer, texts, origin),
        group=group,
        origin=origin,
    )


def _to_place(answer: Any, choices: tuple[str, ...], origin: Origin) -> int:
    text = str(answer).strip()
    letters = LETTERS[: len(choices)]
    if len(text) == 1 and text.upper() in letters:
        return letters.index(text.upper())
    if text in choices:
        return choices.index(text)
    if text.isdigit() and int(text) < len(choices):
        return int(text)
    raise DataError(
        f"{origin}: the answer '{text}' is neither a letter of {letters}, nor one of the "
        f"options, nor a number from 0 to {len(choices) - 1}. Correct it."
    )
