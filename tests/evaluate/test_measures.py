"""Perplexity and classification against direct computation and scikit-learn."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lorakeet.base.errors import NumericsError, RequestError
from lorakeet.evaluate.classify import build_report, measure_classification
from lorakeet.evaluate.perplexity import measure_perplexity

from .conftest import Rows, make_sample


def story_rows(tokenizer):
    texts = ("Once upon a time there was a cat.", "Tom ran.", "The sun was big and the sky blue.")
    return Rows(
        make_sample(tokenizer(text)["input_ids"], line, num_prompt=line)
        for line, text in enumerate(texts, 1)
    )


def direct_loss(model, rows):
    total, count = 0.0, 0
    for sample in rows:
        ids = torch.tensor(sample.ids, dtype=torch.int64)[None]
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(
                model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
            )
        mask = torch.tensor(sample.mask[1:])
        total, count = total + float(nll[mask].sum()), count + int(mask.sum())
    return total / count, count


@pytest.mark.parametrize("max_tokens", [1, 40, 4096])
def test_perplexity_weighs_every_token_alike_whatever_the_batches(llama, max_tokens):
    model, tokenizer = llama
    rows = story_rows(tokenizer)
    values = measure_perplexity(model, rows, 0, max_tokens)
    loss, count = direct_loss(model, rows)
    assert values["loss"] == pytest.approx(loss, abs=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert values["num_targets"] == count


def test_no_rows_and_damaged_weights_are_errors(llama):
    model, tokenizer = llama
    with pytest.raises(RequestError, match="no row"):
        measure_perplexity(model, Rows(), 0)
    kept = model.model.norm.weight.data.clone()
    model.model.norm.weight.data.fill_(float("nan"))
    try:
        with pytest.raises(NumericsError, match="nan"):
            measure_perplexity(model, story_rows(tokenizer), 0)
    finally:
        model.model.norm.weight.data.copy_(kept)


def test_the_report_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random.seed(3)
    names = ("a", "b", "c", "d")
    truth = [random.choice((0, 1, 1, 2)) for _ in range(200)]  # d has no row
    guess = [t if random.random() < 0.6 else random.randrange(3) for t in truth]
    confusion = [[0] * 4 for _ in names]
    for t, g in zip(truth, guess, strict=True):
        confusion[t][g] += 1
    report = build_report(confusion, names)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        truth, guess, labels=range(4), zero_division=0
    )
    for i, name in enumerate(names):
        score = report.per_label[name]
        assert (score.precision, score.recall, score.f1, score.support) == pytest.approx(
            (precision[i], recall[i], f1[i], support[i])
        )
    assert report.accuracy == pytest.approx(metrics.accuracy_score(truth, guess))
    assert report.macro_f1 == pytest.approx(metrics.f1_score(truth, guess, average="macro"))
    assert np.array_equal(confusion, metrics.confusion_matrix(truth, guess, labels=range(4)))


def test_a_classifier_is_scored_row_by_row_with_its_mistakes_named(llama):
    _, tokenizer = llama
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.classifier.weight.data *= 40
    rows = Rows(
        make_sample(torch.randint(3, 500, (length,)).tolist(), line, num_prompt=99, label=line % 3)
        for line, length in enumerate((5, 9, 7, 12, 6, 8), 1)
    )
    report = measure_classification(model, rows, 0, ("x", "y", "z"), 24, tokenizer)
    losses, guesses = [], []
    for sample in rows:
        with torch.no_grad():
            logits = model(torch.tensor(sample.ids, dtype=torch.int64)[None]).logits
        guesses.append(int(logits.argmax()))
        target = torch.tensor([sample.label])
        losses.append(float(torch.nn.functional.cross_entropy(logits, target)))
    right = sum(g == s.label for g, s in zip(guesses, rows, strict=True))
    assert report.accuracy == right / 6
    assert report.loss == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert report.num_errors == len(report.errors) == 6 - right
    first = report.errors[0]
    line = int(first.origin.removeprefix("rows.jsonl line "))
    assert first.expected == "xyz"[rows[line - 1].label]
    assert first.got == "xyz"[guesses[line - 1]]
    assert first.ids == tuple(rows[line - 1].ids)
    assert first.text
    assert [e.probability for e in report.errors] == sorted(
        (e.probability for e in report.errors), reverse=True
    )
