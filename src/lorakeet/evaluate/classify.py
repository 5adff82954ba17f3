"""How well a classifier sorts held-out rows: accuracy, F1 by label, who is taken for whom.

    precision = right / all predicted as the label      recall = right / all of the label
    F1 = 2 * precision * recall / (precision + recall)  macro F1 = plain mean over the labels

Macro F1 counts a rare label as much as a frequent one, so a model that always
answers the frequent one scores high accuracy and low macro F1.  A label with
neither a row nor a prediction has no F1 and is left out of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakeet.base.errors import RequestError
from lorakeet.base.records import EncodedSample
from lorakeet.evaluate.batches import DEFAULT_MAX_TOKENS, iterate_batches
from lorakeet.infer.mode import evaluation_mode
from lorakeet.models.score import score_labels

MAX_ERRORS = 200
_PREVIEW_CHARS = 300


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """One label's part; ``support`` is its number of rows."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, kw_only=True)
class ClassificationError:
    """A row that was sorted wrongly.

    Args:
        origin: file and line.
        probability: what the model gave its wrong answer, 0 to 1.
        ids: the row's tokens, as the model saw them.
        text: the row as text, when a tokenizer was at hand.
    """

    origin: str
    expected: str
    got: str
    probability: float
    ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class ClassificationReport:
    """Scores over all rows.

    Args:
        loss: mean cross-entropy of a row, in nats.
        confusion: rows are the true labels, columns the predicted, in the order of
            ``label_names``.
        errors: the surest mistakes first, at most 200 of ``num_errors``.
    """

    accuracy: float
    macro_f1: float
    loss: float
    num_rows: int
    num_errors: int
    label_names: tuple[str, ...]
    per_label: dict[str, LabelScore]
    confusion: list[list[int]]
    errors: tuple[ClassificationError, ...]


def measure_classification(
    model: Any,
    reader: Any,
    pad_id: int,
    label_names: Sequence[str],
    max_tokens: int = DEFAULT_MAX_TOKENS,
    tokenizer: Any = None,
) -> ClassificationReport:
    """Scores of a classifier on all rows of a reader.

    Args:
        model: its training mode is kept.
        label_names: in the order of the class indices.
        tokenizer: when given, mistakes carry their text.

    Raises:
        RequestError: the reader is empty, or a row has no label of these.
    """
    size = len(label_names)
    confusion = [[0] * size for _ in range(size)]
    errors: list[ClassificationError] = []
    total = 0.0
    with evaluation_mode(model):
        for samples, tensors in iterate_batches(reader, pad_id, max_tokens, model.device):
            _check_labels(samples, size)
            loss_sum, _, logits_BC = score_labels(
                model, tensors["ids_BT"], tensors["attention_BT"], tensors["labels_B"]
            )
            total += float(loss_sum)
            best = torch.softmax(logits_BC.float(), dim=-1).max(dim=-1)
            for sample, got, p in zip(
                samples, best.indices.tolist(), best.values.tolist(), strict=True
            ):
                confusion[sample.label][got] += 1
                if got != sample.label:
                    names = (label_names[sample.label], label_names[got])
                    errors.append(_to_error(sample, names, p, tokenizer))
    errors.sort(key=lambda error: -error.probability)
    return build_report(confusion, label_names, loss_sum=total, errors=errors)


def build_report(
    confusion: list[list[int]],
    label_names: Sequence[str],
    *,
    loss_sum: float = 0.0,
    errors: Sequence[ClassificationError] = (),
) -> ClassificationReport:
    """All scores that follow from a confusion matrix.

    >>> report = build_report([[3, 1], [0, 4]], ("no", "yes"))
    >>> report.accuracy, report.per_label["yes"].precision, round(report.macro_f1, 3)
    (0.875, 0.8, 0.873)
    """
    num_rows = sum(map(sum, confusion))
    columns = [sum(column) for column in zip(*confusion, strict=True)]
    right = [confusion[i][i] for i in range(len(confusion))]
    per_label = {}
    for i, name in enumerate(label_names):
        support = sum(confusion[i])
        per_label[name] = LabelScore(
            precision=_share(right[i], columns[i]),
            recall=_share(right[i], support),
            f1=_share(2 * right[i], columns[i] + support),
            support=support,
        )
    seen = [
        per_label[name].f1
        for name, predicted in zip(label_names, columns, strict=True)
        if per_label[name].support or predicted
    ]
    return ClassificationReport(
        accuracy=_share(sum(right), num_rows),
        macro_f1=sum(seen) / len(seen) if seen else 0.0,
        loss=loss_sum / num_rows if num_rows else 0.0,
        num_rows=num_rows,
        num_errors=num_rows - sum(right),
        label_names=tuple(label_names),
        per_label=per_label,
        confusion=confusion,
        errors=tuple(errors[:MAX_ERRORS]),
    )


def _check_labels(samples: Sequence[EncodedSample], size: int) -> None:
    for sample in samples:
        if not 0 <= sample.label < size:
            raise RequestError(
                f"{sample.origin}: the row has class {sample.label} and the model knows "
                f"0 to {size - 1}. Build the data again with the labels of this model."
            )


def _to_error(
    sample: EncodedSample, names: tuple[str, str], probability: float, tokenizer: Any
) -> ClassificationError:
    ids = tuple(int(token) for token in sample.ids)
    text = tokenizer.decode(ids, skip_special_tokens=True) if tokenizer is not None else ""
    return ClassificationError(
        origin=str(sample.origin),
        expected=names[0],
        got=names[1],
        probability=probability,
        ids=ids,
        text=text[:_PREVIEW_CHARS],
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
