"""The report opens for every run folder: full, empty, broken off or damaged."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from lorakeet.base.events import EventLog, read_events
from lorakeet.base.recipe_file import recipe_from_dict, recipe_to_dict, to_yaml
from lorakeet.base.records import Origin, Question, Turn
from lorakeet.base.run_folder import RunFolder, write_json, write_text
from lorakeet.evaluate.answers import build_answer_report, compare_answer
from lorakeet.evaluate.charts import Series, draw_lines, pick_ticks
from lorakeet.evaluate.classify import ClassificationError, build_report
from lorakeet.evaluate.plots import write_confusion_picture, write_curves_picture
from lorakeet.evaluate.report import write_report
from lorakeet.evaluate.retention import compare_reports

HOSTILE = '<script>alert("x")</script>'
FILES = ("evaluation.json", "plan.json", "resolved.yaml", "data/report.json", "proofs/merge.json",
         "events.jsonl")  # fmt: skip
ASKED = (
    ("买受人应当在什么时候检验标的物?", "约定的检验期限内", "contract"),
    ("What is the form of a contract?", "written, oral or other form", "contract"),
    ("Who bears the risk after delivery?", "the buyer", "risk"),
    (HOSTILE, "4", "arithmetic"),
)


class Page(HTMLParser):
    """Collects tags and checks that they close."""

    VOID = {"meta", "br", "img", "link", "circle", "line", "polyline", "path", "input", "hr"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def make_answers(right_ones):
    rows = []
    for line in range(24):
        text, answer, group = ASKED[line % 4]
        question = Question(turns=(Turn(role="user", content=text),), answer=answer, group=group,
                            origin=Origin(path="questions.jsonl", line=line + 1))  # fmt: skip
        got = answer if line in right_ones else f"I am not sure {HOSTILE}"
        rows.append(compare_answer(question, got))
    return build_answer_report(rows)


def write_run(folder):
    """A run folder as the other floors write it."""
    run = RunFolder(folder)
    recipe = recipe_from_dict({"base": "starter", "data": {"train": "law.jsonl"}})
    log = EventLog(run.events)
    log.emit("run_started", recipe=recipe_to_dict(recipe))
    for step in range(1, 121):
        loss = 2.2 * math.exp(-step / 40) + 0.5 + 0.12 * math.sin(step * 1.7)
        log.emit("step", step=step, epoch=step / 40, loss=loss, num_targets=900, num_tokens=2000,
                 learning_rate=2e-4 * min(1, step / 6) * (1 + math.cos(step / 40)) / 2,
                 gradient_norm=0.4 + 0.3 / step, duration_s=1.1,
                 tokens_per_s=1800 + 90 * math.sin(step))  # fmt: skip
        if step % 12 == 0:
            look = 2.3 * math.exp(-step / 38) + 0.62 + max(0, step - 90) / 700
            log.emit("evaluation", step=step, values={"loss": look, "perplexity": math.exp(look)},
                     train_loss=loss)  # fmt: skip
            answers = [["合同何时成立?", "我不知道。" if step < 50 else "承诺生效时合同成立。"]]
            log.emit("sample_answers", step=step, answers=answers)
    log.emit("alarm", code="overfit", step=108, message="validation loss is 31 % above training.")
    log.emit("run_finished", steps=120, best_step=96, stopped_because="early stopping",
             tokens_per_s=1810.0, duration_s=132.0, values={"loss": 0.8})  # fmt: skip
    base, tuned = make_answers({2, 5}), make_answers(set(range(24)) - {3, 5, 7})
    general = make_answers(set(range(20))), make_answers(set(range(19)))
    confusion = build_report(
        [[41, 3, 1], [6, 30, 2], [0, 4, 28]], ("refund", "delivery", "质量问题"), loss_sum=40.0,
        errors=[ClassificationError(origin="support.jsonl line 7", expected="refund", ids=(5, 6),
                                    got="delivery", probability=0.97, text=HOSTILE)],
    )  # fmt: skip
    write_json(run.evaluation, {
        "domain": {"base": asdict(base), "tuned": asdict(tuned)},
        "general": {"base": asdict(general[0]), "tuned": asdict(general[1])},
        "retention": compare_reports(*general),
        "perplexity": {"base": {"loss": 2.9, "perplexity": 18.2, "num_targets": 900},
                       "tuned": {"loss": 0.7, "perplexity": 2.0, "num_targets": 900}},
        "served": [{"question": "Hi?", "expected": "A good day", "base": "Hello",
                    "tuned": "Good day"}],
        "classification": asdict(confusion),
    })  # fmt: skip
    write_rest(run, recipe)
    return run


def write_rest(run, recipe):
    write_json(run.data_report, {
        "num_train": 1180, "num_validation": 62, "num_dropped": 17, "num_cut": 0,
        "tokens": {"total": 240_000, "trained_fraction": 0.41, "max": 900, "histogram": [
            {"from_tokens": 1, "to_tokens": 128, "rows": 700},
            {"from_tokens": 129, "to_tokens": 900, "rows": 480}]},
        "languages": {"Chinese": 0.7, "Latin": 0.3}, "labels": {},
        "dropped": {"duplicate": {"rows": 15, "example": "law.jsonl line 8: the same text."}},
        "warnings": [f"17 rows were dropped {HOSTILE}."],
    })  # fmt: skip
    write_json(run.plan, {
        "model": {"parameters": 6_200_000}, "chosen": "lora",
        "methods": [{"kind": "lora", "trained_parameters": 310_000, "fits": True, "why": "Fits.",
                     "bytes": {"weights": 25e6, "activations": 4e8, "total": 4.3e8}}],
        "measured": {"peak_bytes": 4.6e8, "tokens_per_s": 1790.0},
    })  # fmt: skip
    write_json(run.proofs / "merge.json", {
        "name": "merge", "passed": True, "dtype": "float32", "problems": [],
        "figures": {"max_logit_difference": 3.1e-6, "top1_agreement": 1.0}, "hashes": {},
    })  # fmt: skip
    dropped = {"file": "law.jsonl", "line": 8, "reason": "twice", "preview": HOSTILE}
    write_text(run.dropped, json.dumps({**dropped, "origin": "law.jsonl line 8"}) + "\n")
    write_text(run.resolved, to_yaml({
        "recipe": recipe_to_dict(recipe), "versions": {"torch": "2.13.0"},
        "hashes": {"base": "ab" * 32, "data": {}},
    }))  # fmt: skip


def visible_text(html):
    return re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL)


def test_a_full_run_gives_one_page_that_asks_nothing_of_the_network(tmp_path):
    html = write_report(write_run(tmp_path / "law")).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    asking = {"src", "href", "srcset", "action", "data"}
    assert not [tag for tag, attrs in page.tags if asking & attrs.keys() or tag == "script"]
    assert not re.search(r"url\(|@import|https?://", html)
    text = visible_text(html)
    for part in (
        "A good day",
        "8.3 %",
        "87.5 %",
        "18.20",
        "passed",
        "5.00 %",
        "承诺生效时合同成立",
    ):
        assert part in text, part
    assert html.count('<svg class="chart"') == 5


def test_text_of_models_and_data_stays_text(tmp_path):
    html = write_report(write_run(tmp_path / "law")).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_an_empty_folder_says_what_was_not_run(tmp_path):
    text = visible_text(write_report(RunFolder(tmp_path / "none")).read_text())
    assert "not started" in text
    assert text.count("Not run:") >= 5
    assert text.count("not run") >= 5


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["", "[1]", '{"a": ', '{"domain": 3, "methods": [7]}'])
def test_a_damaged_file_never_stops_the_page(tmp_path, name, content):
    run = write_run(tmp_path / "law")
    (run.path / name).write_text(content)
    Page(write_report(run).read_text(encoding="utf-8"))


@pytest.mark.parametrize("gone", FILES)
def test_a_missing_file_never_stops_the_page(tmp_path, gone):
    run = write_run(tmp_path / "law")
    (run.path / gone).unlink()
    assert "Lorakeet" in write_report(run).read_text(encoding="utf-8")


def test_a_killed_run_and_a_resumed_one_are_told_apart(tmp_path):
    run = RunFolder(tmp_path / "r")
    log = EventLog(run.events)
    log.emit("run_started", recipe={})
    log.emit("step", step=1, loss=2.0)
    assert "unfinished" in visible_text(write_report(run).read_text())
    log.emit("run_interrupted", step=1)
    assert "Stopped after step 1" in visible_text(write_report(run).read_text())


def test_charts_take_one_point_nan_and_nothing():
    assert draw_lines([Series(name="a", points=[])], x_label="x", y_label="y") is None
    assert "circle" in draw_lines([Series(name="a", points=[(1, 2.0)])], x_label="x", y_label="y")
    points = [(n, float("nan") if n % 2 else 5.0) for n in range(2000)]
    chart = draw_lines([Series(name="a", points=points)], x_label="x", y_label="y")
    assert "nan" not in chart
    assert chart.count(",") < 500
    for low, high in ((0.0, 1e-7), (-3.0, 9.0), (1e6, 1e6), (0.0, 0.0)):
        ticks = pick_ticks(low, high)
        assert ticks[0] <= low + 1e-12
        assert ticks[-1] >= high
        assert len(ticks) <= 8


def test_pictures_are_png_files_with_chinese_labels(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "law")
    report = json.loads(run.evaluation.read_text())["classification"]
    paths = [
        write_confusion_picture(tmp_path / "p" / "confusion.png", report),
        write_curves_picture(tmp_path / "p" / "curves.png", read_events(run.events)),
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
