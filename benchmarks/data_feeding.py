"""Rows a second of tokenisation + packing against TRL, and memory as rows grow.

    python -m benchmarks.data_feeding [--rows 20000] [--repeats 3] [--sizes 1000 10000 100000]

Rows: chats with one system prompt and lognormal(median 180, sigma 0.6) words, at most 500.
Ours runs the whole data stage of the default recipe (reading, cleaning, masking of private
data, removal of duplicates, mask of trained tokens, shards) and builds the packs of every
step of an epoch.  The peer maps ``apply_chat_template`` over ``datasets`` and packs with
TRL's ``pack_dataset``, which does none of the cleaning: once in one process, as TRL's
default is, and once with a process a core.  Every arm is a process tree of its own that
reads the same JSONL file; imports and the tokenizer's loading are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lorakeet.base.run_folder import write_text

SHARED = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "smollm2-135m-instruct"
RESULTS = Path(__file__).parent / "results"
ARMS = ("lorakeet", "lorakeet, 1 process", "datasets + TRL", "datasets + TRL, a process a core")
WORDS = "time year people way day man thing woman life child world school state family".split()
PACK_TOKENS = 2048


def write_rows(path: Path, num_rows: int) -> None:
    """Chats under one system prompt, as JSON Lines."""
    rng = random.Random(0)
    system = "You are a helpful assistant who answers briefly and kindly."
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            words = min(500, max(10, int(rng.lognormvariate(5.19, 0.6))))
            asked = " ".join(rng.choices(WORDS, k=int(0.4 * words)))
            answer = " ".join(rng.choices(WORDS, k=int(0.6 * words)))
            messages = [{"role": "system", "content": system},
                        {"role": "user", "content": f"{asked} {number}"},
                        {"role": "assistant", "content": answer}]  # fmt: skip
            file.write(json.dumps({"messages": messages}) + "\n")


def read_clocks() -> tuple[float, float]:
    """Wall seconds, and processor seconds of this process and its ended children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(use.ru_utime + use.ru_stime for use in usage)


def run_lorakeet(
    rows: Path, work: Path, *, workers: str | int, packs: bool = True
) -> tuple[float, float]:
    """The clocks before the data stage and the building of the packs of one epoch."""
    from lorakeet.base.recipe_file import recipe_from_dict
    from lorakeet.data.order import StepOrder
    from lorakeet.data.packing import build_pack
    from lorakeet.data.prefixes import choose_prefixes, pack_shared_rows
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.load import read_tokenizer

    tokenizer = read_tokenizer(str(SHARED))
    recipe = recipe_from_dict({
        "base": str(SHARED), "data": {"train": str(rows), "validation": 0, "workers": workers},
        "train": {"epochs": 1, "early_stopping": None},
    })  # fmt: skip
    started = read_clocks()
    data = prepare_data(recipe, tokenizer, work / "data", lambda *a, **k: None)
    order = StepOrder.of_recipe(recipe, data.train.source_of)
    for step in range(1, order.num_steps + 1 if packs else 1):
        samples = [data.train[row] for row in order.rows_of_step(step)]
        prefixes = choose_prefixes(samples)
        assert prefixes is not None  # the system prompt
        groups = pack_shared_rows([len(s.ids) for s in samples], prefixes, PACK_TOKENS)
        for group in groups:
            build_pack([samples[i] for i in group], prefixes.among(group))
    return started


def run_trl(rows: Path, work: Path, *, num_proc: int | None) -> tuple[float, float]:
    """The clocks before ``datasets.map`` with the chat template and TRL's packing."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl.data_utils import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(SHARED)

    def encode(row: dict) -> dict:
        return {"input_ids": tokenizer.apply_chat_template(row["messages"], return_dict=True)
                ["input_ids"]}  # fmt: skip

    started = read_clocks()
    loaded = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(work))
    mapped = loaded.map(encode, remove_columns=["messages"], num_proc=num_proc)
    packed = pack_dataset(mapped, PACK_TOKENS, strategy="bfd", map_kwargs={"num_proc": num_proc})
    for row in packed.iter(batch_size=64):
        assert row["input_ids"]
    return started


def run_arm(arm: str, rows: Path, work: Path) -> None:
    """One arm in this process; seconds and peak memory as one line of JSON."""
    cores = len(os.sched_getaffinity(0))
    if arm == "memory":
        started = run_lorakeet(rows, work, workers="auto", packs=False)
    elif arm.startswith("lorakeet"):
        started = run_lorakeet(rows, work, workers=0 if "1 process" in arm else "auto")
    else:
        started = run_trl(rows, work, num_proc=cores if "core" in arm else None)
    wall, processor = (now - then for now, then in zip(read_clocks(), started, strict=True))
    own, worker = (resource.getrusage(who).ru_maxrss * 1024
                   for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))  # fmt: skip
    print("\n" + json.dumps({"seconds": wall, "processor_seconds": processor,
                             "peak": own, "worker_peak": worker}))  # fmt: skip


def start_arm(arm: str, rows: Path) -> dict[str, float]:
    """One arm in a process of its own."""
    work = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "benchmarks.data_feeding", "--arm", arm,
               "--file", str(rows), "--work", str(work)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(work)
    if done.returncode:
        raise SystemExit(f"{arm}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_speed(folder: Path, num_rows: int, repeats: int) -> list[str]:
    """Medians of interleaved runs, as a table."""
    rows = folder / "rows.jsonl"
    write_rows(rows, num_rows)
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    work: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(repeats):
        for arm in ARMS:
            seen = start_arm(arm, rows)
            found[arm].append(num_rows / seen["seconds"])
            work[arm].append(num_rows / seen["processor_seconds"])
            print(arm, round(found[arm][-1]), round(work[arm][-1]), flush=True)
    middle = {arm: statistics.median(rates) for arm, rates in found.items()}
    return [
        f"# Tokenisation + packing: {num_rows:,} rows, packs of {PACK_TOKENS} tokens", "",
        "| | rows/s (range) | ours is faster by | rows per processor second |", "|---|---|---|---|",
        *(f"| {arm} | {middle[arm]:,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | "
          f"{middle['lorakeet'] / middle[arm]:.2f}x | {statistics.median(work[arm]):,.0f} |"
          for arm, rates in found.items()),
        "", f"Medians of {repeats} interleaved runs on {os.cpu_count()} cores.",
    ]  # fmt: skip


def measure_memory(folder: Path, sizes: list[int]) -> list[str]:
    """Peak memory of the data stage by rows, as a table."""
    table = ["", "## Memory of the data stage as rows grow", "",
             "| rows | file MiB | seconds | peak MiB | peak of a worker MiB |",
             "|---|---|---|---|---|"]  # fmt: skip
    for size in sizes:
        rows = folder / f"{size}.jsonl"
        write_rows(rows, size)
        seen = start_arm("memory", rows)
        table.append(
            f"| {size:,} | {rows.stat().st_size / 2**20:.0f} | {seen['seconds']:.0f} | "
            f"{seen['peak'] / 2**20:.0f} | {seen['worker_peak'] / 2**20:.0f} |"
        )
        print(table[-1], flush=True)
        rows.unlink()
    return [*table, "", "Made by `python -m benchmarks.data_feeding`."]


def main() -> None:
    """Runs all arms in turn, then the sizes, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000, 10_000, 100_000],
                        help="rows of the memory table; add 1000000 for the long one")  # fmt: skip
    parser.add_argument("--arm", help="run one arm in this process")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    if asked.arm:
        run_arm(asked.arm, asked.file, asked.work)
        return
    folder = Path(tempfile.mkdtemp())
    table = compare_speed(folder, asked.rows, asked.repeats) if asked.repeats else []
    table += measure_memory(folder, asked.sizes)
    shutil.rmtree(folder)
    print("\n".join(table))
    write_text(RESULTS / "data_feeding.md", "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
