"""A causal model on real instruction data: LoRA against full fine-tuning of the starter.

    python -m benchmarks.causal_recipe [--rows 1200]

Short rows of Dolly 15k (English) and of a Chinese medical dialogue set, through
``lorakeet.train``.  The starter knows neither; the table shows how far the perplexity
of answers to unseen rows falls, each method at the better of two learning rates.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lorakeet as lk
from lorakeet.base.events import read_events
from lorakeet.base.run_folder import RunFolder, read_json, write_text

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
RESULTS = Path(__file__).parent / "results"
SOURCES = {  # file, fields, and how many bytes a row may have
    "Dolly 15k": ("dolly15k/dolly.jsonl.xz", ("instruction", "context", "response"), 400),
    "Chinese medical dialogue": (
        "zh_medical_dialogue/internal_medicine.jsonl.xz", ("ask", "none", "answer"), 1000),
}  # fmt: skip
METHODS = {
    "LoRA r=16, all linear": ({"kind": "lora", "rank": 16, "alpha": 32}, (2e-3, 5e-3)),
    "full fine-tuning": ({"kind": "full"}, (3e-4, 1e-3)),
}
VALIDATION_ROWS = 120


def read_short_rows(
    path: Path, fields: tuple[str, str, str], max_bytes: int
) -> Iterator[dict[str, str]]:
    """Rows with a question and an answer that fit the starter's window."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            question, extra, answer = (str(row.get(field) or "").strip() for field in fields)
            if question and answer and len(f"{question}{extra}{answer}".encode()) < max_bytes:
                yield {"instruction": question, "input": extra, "output": answer}


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def run_once(work: Path, method: dict, rate: float) -> dict:
    """One training run and the perplexity before and after."""
    folder = work / f"run-{time.time_ns()}"
    trained = lk.train({
        "base": "starter",
        "data": {"train": str(work / "train.jsonl"), "validation": str(work / "held.jsonl"),
                 "max_tokens": 768},
        "method": method,
        "train": {"learning_rate": rate, "epochs": 2, "batch_size": 16,
                  "checkpoint_every_steps": 1000},
    }, folder)  # fmt: skip
    run = RunFolder(folder)
    looks = [e for e in read_events(run.events) if e["kind"] == "evaluation"]
    done = next(e for e in read_events(run.events) if e["kind"] == "run_finished")
    plan = read_json(run.plan)
    kind = next(m for m in plan["methods"] if m["kind"] == method["kind"])
    return {"rate": rate, "before": looks[0]["values"]["perplexity"],
            "after": trained.metrics["perplexity"], "fraction": kind["trained_fraction"],
            "duration_s": done["duration_s"], "tokens_per_s": done["tokens_per_s"]}  # fmt: skip


def main() -> None:
    """Runs every method on every source and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1200)
    arguments = parser.parse_args()
    table = [
        f"# The starter on real instruction data: {arguments.rows:,} rows, 2 epochs", "",
        "Perplexity of the answers to rows that were never trained.", "",
        "| data | method | trained | rate | before | after | seconds | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for source, (path, fields, max_bytes) in SOURCES.items():
        work = Path(tempfile.mkdtemp())
        rows = [
            row
            for row, _ in zip(
                read_short_rows(SHARED / path, fields, max_bytes),
                range(arguments.rows + VALIDATION_ROWS),
                strict=False,
            )
        ]
        write_rows(work / "held.jsonl", rows[:VALIDATION_ROWS])
        write_rows(work / "train.jsonl", rows[VALIDATION_ROWS:])
        for name, (method, rates) in METHODS.items():
            best = min((run_once(work, method, rate) for rate in rates), key=lambda r: r["after"])
            table.append(
                f"| {source} | {name} | {100 * best['fraction']:.1f} % | {best['rate']:g} | "
                f"{best['before']:.1f} | {best['after']:.2f} | {best['duration_s']:.0f} | "
                f"{best['tokens_per_s']:,.0f} |"
            )
            print(table[-1], flush=True)
        shutil.rmtree(work)
    table += ["", "Made by `python -m benchmarks.causal_recipe` on a CPU with 2 cores; one seed."]
    write_text(RESULTS / "causal_recipe.md", "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
