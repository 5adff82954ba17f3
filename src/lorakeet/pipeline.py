"""All stages in order: train, evaluate, merge, ask over HTTP, report.

Each stage leaves files and a stamp of its inputs; a second call on the same
folder goes on where the first one stopped and repeats nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakeet.api.evaluation import evaluate
from lorakeet.api.resolve import recipe_of_run, to_recipe
from lorakeet.api.shipping import export_merged
from lorakeet.api.stages import open_sinks, stage
from lorakeet.api.training import resume, train
from lorakeet.base.errors import RequestError
from lorakeet.base.events import Emit, read_events
from lorakeet.base.recipe import Recipe
from lorakeet.base.recipe_file import recipe_to_dict
from lorakeet.base.run_folder import RunFolder, read_json, sha256_folder, write_json
from lorakeet.base.stamps import fingerprint, is_fresh, write_stamp
from lorakeet.base.units import (
    to_percent,
    to_readable_bytes,
    to_readable_count,
    to_readable_seconds,
)

EMBEDDED = Path(__file__).resolve().parent / "embedded" / "quickstart"


def run_all(
    recipe: str | Path | Recipe,
    run: str | Path,
    *,
    emit: Emit,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Documents to a proved specialist: every stage that is not fresh.

    A fully tuned model has nothing to merge, and a classifier does not chat, so these
    leave out the stages that are not theirs.

    Args:
        run: the folder; one that was stopped half-way goes on.
        emit: hears every event besides the run's own diary.

    Returns:
        the closing figures, the served answers and the report's path.

    Raises:
        RequestError: the folder holds a run of another recipe.
    """
    started_s = time.perf_counter()
    folder = RunFolder(Path(run))
    asked = to_recipe(recipe)
    _train_stage(folder, asked, emit, stop_requested)
    _evaluate_stage(folder, asked, emit)
    served: list[dict[str, str]] = []
    if asked.method.kind == "lora":
        _merge_stage(folder, emit)
        served = _ask_stage(folder, asked, emit) if asked.task == "chat" else []
    from lorakeet.evaluate.report import write_report

    report = write_report(folder)
    figures = closing_figures(folder)
    figures["wall time"] = to_readable_seconds(time.perf_counter() - started_s)
    return {"figures": figures, "served": served, "report": str(report), "run": str(folder.path)}


def _train_stage(
    run: RunFolder, recipe: Recipe, emit: Emit, stop_requested: Callable[[], bool]
) -> None:
    """Trains, or goes on with a run of the same recipe."""
    digest = fingerprint(recipe_to_dict(recipe))
    if is_fresh(run, "train", digest):
        return
    if run.resolved.is_file():
        if recipe_to_dict(recipe_of_run(run)) != recipe_to_dict(recipe):
            raise RequestError(
                f"{run.path}: this folder holds a run of another recipe. Choose another folder."
            )
        resume(run.path, emit=emit, stop_requested=stop_requested)
    else:
        train(recipe, run.path, emit=emit, stop_requested=stop_requested)
    write_stamp(run, "train", digest)


def _evaluate_stage(run: RunFolder, recipe: Recipe, emit: Emit) -> None:
    """Asks base and tuned model."""
    trained = run.adapter if recipe.method.kind == "lora" else run.model
    digest = fingerprint(sha256_folder(trained), recipe_to_dict(recipe)["evaluate"])
    if not is_fresh(run, "evaluate", digest):
        evaluate(run.path, emit=emit)
        write_stamp(run, "evaluate", digest)


def _merge_stage(run: RunFolder, emit: Emit) -> None:
    """Merges and verifies from disk in a fresh process."""
    digest = fingerprint(sha256_folder(run.adapter))
    if is_fresh(run, "merge", digest):
        return
    listen = open_sinks(run, emit)
    with stage(listen, "merge"):
        proof = export_merged(run.path, run.merged)
        listen("proof", **asdict(proof))
    write_stamp(run, "merge", digest)


def _ask_stage(run: RunFolder, recipe: Recipe, emit: Emit) -> list[dict[str, str]]:
    """Three questions over HTTP, each to the base and to the adapter."""
    result = read_json(run.evaluation)
    if "served" in result:
        return result["served"]
    from lorakeet.serve.http import start_background_server

    questions = _three_questions(result) or dict.fromkeys(recipe.train.sample_prompts[:3], "")
    if not questions:
        return []
    listen = open_sinks(run, emit)
    with (
        stage(listen, "serve"),
        start_background_server(recipe.base, {"specialist": run.adapter}) as server,
    ):
        address = server.address
        names = list_models(address)
        base = next(name for name in names if name != "specialist")
        served = [
            {
                "question": q,
                "expected": expected,
                "base": ask(address, base, q),
                "tuned": ask(address, "specialist", q),
            }
            for q, expected in questions.items()
        ]
    write_json(run.evaluation, {**result, "served": served})
    return served


def _three_questions(result: dict[str, Any]) -> dict[str, str]:
    """Held-out questions spread over the domain, and their answers; {} when none was held out."""
    rows = result.get("domain", {}).get("tuned", {}).get("rows", [])
    rows = sorted(rows, key=lambda row: str(row["question"]))
    step = max(1, len(rows) // 3)
    return {row["question"]: row["expected"] for row in rows[::step][:3]}


def list_models(address: str) -> list[str]:
    """The names that a server answers to."""
    return [item["id"] for item in _request(f"{address}/v1/models")["data"]]


def ask(address: str, model: str, question: str, *, max_tokens: int = 32) -> str:
    """One chat completion over HTTP."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    answer = _request(f"{address}/v1/chat/completions", body)
    return answer["choices"][0]["message"]["content"].strip()


def _request(url: str, body: dict[str, Any] | None = None) -> Any:
    """A JSON request to a server of ours on this machine."""
    from urllib.request import Request, urlopen

    data = json.dumps(body).encode() if body is not None else None
    request = Request(url, data=data, headers={"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def closing_figures(run: RunFolder) -> dict[str, str]:
    """What the closing table shows, each figure read from the run folder."""
    result = read_json(run.evaluation)
    plan = read_json(run.plan)
    kind = recipe_of_run(run).method.kind
    trained = next(m for m in plan["methods"] if m["kind"] == kind)["trained_parameters"]
    whole = plan["model"]["parameters"]
    figures = {
        "trained parameters": f"{to_readable_count(trained)} of {to_readable_count(whole)}"
        f" ({to_percent(trained / whole)})"
    }
    for name, title in (
        ("domain", "held-out domain accuracy"),
        ("general", "general skills"),
    ):
        if name in result:
            base, tuned = (result[name][side]["accuracy"] for side in ("base", "tuned"))
            figures[title] = (
                f"{to_percent(base)} -> {to_percent(tuned)} ({100 * (tuned - base):+.1f} points)"
            )
    if "perplexity" in result:
        base, tuned = (result["perplexity"][side]["perplexity"] for side in ("base", "tuned"))
        figures["validation perplexity"] = f"{base:.2f} -> {tuned:.2f}"
    if "classification" in result:
        figures["validation accuracy"] = to_percent(result["classification"]["accuracy"])
    done = [event for event in read_events(run.events) if event["kind"] == "run_finished"]
    if done and done[-1].get("peak_bytes"):
        figures["peak memory"] = to_readable_bytes(done[-1]["peak_bytes"])
    if (run.proofs / "merge.json").is_file():
        merge = read_json(run.proofs / "merge.json")
        figures["merge, reloaded from disk"] = "verified" if merge["passed"] else "FAILED"
    return figures
