"""Predicted against measured peak memory and speed: 46 recipes, each a real run of its own.

    python -m benchmarks.plan_accuracy [--only 135m-512-lora ...] [--trial]

Shapes x methods x lengths, random weights, five optimiser steps with a validation and a
checkpoint after the third, which is written beside the fourth.  ``measured`` is the highest
resident memory of the whole ``lorakeet.train`` process as the system counts it, ``predicted``
the plan's total from config.json and the rows' lengths.  Tokens/s are the median of the steps
after the first, and need a quiet machine; peaks do not.  ``--trial`` makes the steps of
``plan --measure`` before each run and adds how far their peak and their tokens/s are from
those of the run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lorakeet.api.measuring import run_trial
from lorakeet.base.events import read_events
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.run_folder import write_text
from lorakeet.plan.memory import kind_of
from lorakeet.train.memory import peak_bytes

RESULTS = Path(__file__).parent / "results"
STARTER = Path(__file__).resolve().parents[1] / "src" / "lorakeet" / "embedded" / "starter"
# hidden, layers, heads, key-value heads, feed-forward width, vocabulary; a mixture has 8 experts
SHAPES = {
    "tiny": (64, 2, 4, 4, 176, 2560),
    "20m": (384, 8, 6, 2, 1024, 16384),
    "135m": (576, 30, 9, 3, 1536, 49152),
    "mixture": (256, 6, 4, 2, 512, 16384),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 16},
    "dora": {"rank": 16, "dora": True},
    "adalora": {"rank": 12, "adalora": {"target_rank": 8, "settle_fraction": 0.0}},
    "full": {"kind": "full"},
    "int8": {"rank": 16},
    "qlora": {"rank": 16},
}
QUANTIZED = {"int8": "int8", "qlora": "nf4"}
# shape, dtype of the checkpoint, tokens of a row, tokens of a micro-batch
WORK = {
    "tiny-512": ("tiny", "float32", 512, 2048),
    "20m-256": ("20m", "float32", 256, 512),
    "20m-256-bf16": ("20m", "bfloat16", 256, 512),
    "20m-1024": ("20m", "float32", 1024, 1024),
    "mixture-512": ("mixture", "float32", 512, 1024),
    "135m-128": ("135m", "float32", 128, 256),
    "135m-512": ("135m", "float32", 512, 512),
    "135m-512-bf16": ("135m", "bfloat16", 512, 512),
}


def write_base(folder: Path, shape: str, dtype: str) -> None:
    """A Llama, or a Mixtral, of a shape with random weights and the starter's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = "mixtral" if shape == "mixture" else "llama"
    hidden, layers, heads, kv_heads, ffn, vocabulary = SHAPES[shape]
    config = AutoConfig.for_model(
        kind, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=ffn, vocab_size=vocabulary,
        max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    for path in STARTER.glob("*token*"):
        shutil.copy(path, folder)


def write_rows(path: Path, length: int) -> None:
    """Rows of at least ``length`` tokens, which the recipe cuts to exactly that."""
    draw = random.Random(0)
    words = "river stone seven bright garden letter winter doctor travel silver".split()
    rows = [{"text": " ".join(draw.choices(words, k=length))} for _ in range(24)]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(base: Path, rows: Path, method: str, length: int, tokens: int) -> dict[str, Any]:
    """Five steps of two full micro-batches."""
    return {
        "base": str(base), "task": "text",
        "data": {"train": str(rows), "validation": 0.1, "max_tokens": length, "too_long": "cut",
                 "deduplicate": False},
        "method": METHODS[method],
        "quantization": {"kind": QUANTIZED.get(method, "none"), "cache": "none"},
        "train": {"max_steps": 5, "checkpoint_every_steps": 3, "batch_size": 2 * tokens // length,
                  "micro_batch_tokens": tokens, "evaluate_every_steps": 3},
        "plan": {"measure_first": False},
    }  # fmt: skip


def run_one(recipe: dict[str, Any], run: Path) -> None:
    """A training run in this process; its peak and its plan as one line of JSON."""
    import lorakeet as lk

    lk.train(recipe, run)
    peak = peak_bytes()
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    asked = kind_of(recipe_from_dict(recipe))
    row = next(m for m in plan["methods"] if m["kind"] == asked)
    steps = [e for e in read_events(run / "events.jsonl") if e["kind"] == "step"][1:]
    rate = statistics.median(e["num_tokens"] / e["duration_s"] for e in steps)
    print("\n" + json.dumps({
        "predicted": row["bytes"], "measured": peak, "predicted_tokens_per_s": row["tokens_per_s"],
        "tokens_per_s": rate, "rates": plan["rates"],
    }))  # fmt: skip


def try_one(recipe: dict[str, Any], work: Path) -> dict[str, Any]:
    """What the trial steps of a plan find."""
    asked = recipe_from_dict(recipe)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        return run_trial(asked, Path(folder))


def measure(name: str, method: str, work: Path, *, has_trial: bool) -> dict[str, Any]:
    """One recipe in a fresh process, with its trial before it where that is asked for."""
    shape, dtype, length, tokens = WORK[name]
    base, rows = work / f"{shape}-{dtype}", work / f"rows-{length}.jsonl"
    if not base.is_dir():
        code = "from pathlib import Path; from benchmarks.plan_accuracy import write_base; " \
               f"write_base(Path({str(base)!r}), {shape!r}, {dtype!r})"  # fmt: skip
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    write_rows(rows, length)
    recipe = recipe_of(base, rows, method, length, tokens)
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--recipe", json.dumps(recipe),
               "--run", str(work / f"{name}-{method}")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}-{method}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found | ({"trial": try_one(recipe, work)} if has_trial else {})


def main() -> None:
    """Runs the recipes and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names such as 135m-128-lora")
    parser.add_argument("--trial", action="store_true", help="make plan --measure's steps too")
    parser.add_argument("--recipe", help="run one recipe in this process")
    parser.add_argument("--run", type=Path)
    asked = parser.parse_args()
    if asked.recipe:
        run_one(json.loads(asked.recipe), asked.run)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in WORK:
            for method in METHODS:
                key = f"{name}-{method}"
                # experts that a file holds one by one are not read into few bits
                is_read = not (name.startswith("mixture") and method in QUANTIZED)
                if is_read and (not asked.only or key in asked.only):
                    found[key] = measure(name, method, Path(folder), has_trial=asked.trial)
                    print(key, json.dumps(found[key]), flush=True)
    table = to_table(found)
    print(table)
    if not asked.only:
        write_text(RESULTS / "plan_accuracy.md", table)


def to_table(found: dict[str, dict[str, Any]]) -> str:
    """A row a recipe: predicted, measured and their difference, of memory and of speed."""
    lines = [
        "# Predicted against measured peak memory and speed of training, CPU", "",
        "| recipe (shape-tokens-method) | predicted MiB | measured MiB | difference | predicted "
        "tokens/s | measured tokens/s | difference | trial: peak, tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for key, one in found.items():
        sizes, rates = compare(one)
        told = "-"
        if "trial" in one:
            peak = one["trial"]["peak_bytes"] / one["measured"] - 1
            rate = one["trial"]["tokens_per_s"] / one["tokens_per_s"] - 1
            told = f"{100 * peak:+.1f} %, {100 * rate:+.1f} %"
        memory = " | ".join(f"{size / 2**20:.0f}" for size in sizes[:2])
        speed = " | ".join(f"{rate:.0f}" for rate in rates[:2])
        lines.append(f"| {key} | {memory} | {100 * sizes[2]:+.1f} % | {speed} | "
                     f"{100 * rates[2]:+.1f} % | {told} |")  # fmt: skip
    both = [compare(one) for one in found.values()]
    for what, place, limit in (("peaks", 0, 0.1), ("speeds", 1, 0.2)):
        off = [abs(each[place][2]) for each in both]
        near = sum(value <= limit for value in off)
        lines += ["", f"{near} of {len(off)} {what} within {100 * limit:.0f} %; the largest "
                  f"difference is {100 * max(off, default=0):.1f} %."]  # fmt: skip
    return "\n".join([*lines, "", "Made by `python -m benchmarks.plan_accuracy`."]) + "\n"


def compare(one: dict[str, Any]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(predicted, measured, predicted over measured less 1) of the peak and of the speed."""
    peak = (one["predicted"]["total"], one["measured"])
    rate = (one["predicted_tokens_per_s"], one["tokens_per_s"])
    return (*peak, peak[0] / peak[1] - 1), (*rate, rate[0] / rate[1] - 1)


if __name__ == "__main__":
    main()
