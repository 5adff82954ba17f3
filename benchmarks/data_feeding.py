"""Rows a second of tokenisation + packing against TRL, and memory as rows grow.

    python -m benchmarks.data_feeding [--rows 20000] [--repeats 3] [--growth 1000 10000 100000]

Rows: chats with one system prompt and lognormal(median 180, sigma 0.6) words, at most 500,
that are runs of real prose (questions and answers of Dolly and MedQuAD, film reviews of
IMDb) from a random place, so that words are as frequent and as rare as in real data.

"lorakeet" runs the whole data stage of the default recipe: reading, cleaning, masking of
private data, removal of duplicates, the data report, the mask of trained tokens, shards with
hashes; then it builds the packs of every step of an epoch with their shared openings.
"the same work only" is the same with cleaning, masking and removal of duplicates switched
off.  The peer maps ``apply_chat_template`` over ``datasets`` and packs with TRL's
``pack_dataset``, which does none of the cleaning and no mask: once in one process, as TRL's
default is, and once with a process a core.  Every arm is a process tree of its own that
reads the same JSONL file; imports and the tokenizer's loading are not counted.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import Any

from lorakeet.base.run_folder import write_text

ROOT = Path(__file__).resolve().parents[2] / "shared"
SHARED = ROOT / "tokenizers" / "smollm2-135m-instruct"
PROSE = {"data/dolly15k/dolly.jsonl.xz": "response", "data/medquad/medquad.jsonl.xz": "answer",
         "measure_only/imdb/train.jsonl.xz": "text"}  # fmt: skip
RESULTS = Path(__file__).parent / "results"
ARMS = ("lorakeet", "lorakeet, the same work only", "lorakeet, 1 process", "datasets + TRL",
        "datasets + TRL, a process a core")  # fmt: skip
SAME_WORK = {"clean": False, "deduplicate": False, "private_data": "keep"}
PACK_TOKENS = 2048


def read_prose() -> list[str]:
    """The words of real texts in their order."""
    words: list[str] = []
    for name, field in PROSE.items():
        with lzma.open(ROOT / name, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)[field] for line in islice(file, 8000)]
        words += " ".join(texts).split(" ")
    return words


def write_rows(path: Path, num_rows: int) -> None:
    """Chats under one system prompt, as JSON Lines."""
    rng = random.Random(0)
    prose = read_prose()
    system = "You are a helpful assistant who answers briefly and kindly."
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            count = min(500, max(10, int(rng.lognormvariate(5.19, 0.6))))
            start = rng.randrange(len(prose) - count)
            words, asked = prose[start : start + count], int(0.4 * count)
            messages = [{"role": "system", "content": system},
                        {"role": "user", "content": " ".join(words[:asked]) or "?"},
                        {"role": "assistant", "content": " ".join(words[asked:])}]  # fmt: skip
            file.write(json.dumps({"messages": messages}) + "\n")


def read_clocks() -> tuple[float, float]:
    """Wall seconds, and processor seconds of this process and its ended children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(use.ru_utime + use.ru_stime for use in usage)


def run_lorakeet(
    rows: Path, work: Path, *, workers: str | int, packs: bool = True, **settings: Any
) -> tuple[float, float]:
    """The clocks before the data stage and the building of the packs of one epoch."""
    from lorakeet.base.recipe_file import recipe_from_dict
    from lorakeet.data.order import StepOrder
    from lorakeet.data.packing import build_pack, pack_rows
    from lorakeet.data.prefixes import choose_prefixes, pack_shared_rows
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.load import read_tokenizer

    tokenizer = read_tokenizer(str(SHARED))
    recipe = recipe_from_dict({
        "base": str(SHARED),
        "data": {"train": str(rows), "validation": 0, "workers": workers, **settings},
        "train": {"epochs": 1, "early_stopping": None},
    })  # fmt: skip
    started = read_clocks()
    data = prepare_data(recipe, tokenizer, work / "data", lambda *a, **k: None)
    order = StepOrder.of_recipe(recipe, data.train.source_of)
    for step in range(1, order.num_steps + 1 if packs else 1):
        samples = [data.train[row] for row in order.rows_of_step(step)]
        prefixes = choose_prefixes(samples)
        lengths = [len(sample.ids) for sample in samples]
        groups = (pack_rows(lengths, PACK_TOKENS) if prefixes is None
                  else pack_shared_rows(lengths, prefixes, PACK_TOKENS))  # fmt: skip
        for group in groups:
            build_pack([samples[i] for i in group], prefixes and prefixes.among(group))
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


class WorkerWatch(Thread):
    """Notes the peak memory of the processes that this one starts, while they live."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._ended = Event()

    def run(self) -> None:
        """Looks five times a second."""
        while not self._ended.wait(0.2):
            children = [pid for task in Path("/proc/self/task").iterdir()
                        for pid in (task / "children").read_text().split()]  # fmt: skip
            for pid in children:
                with suppress(OSError):
                    told = Path(f"/proc/{pid}/status").read_text()
                    if found := re.search(r"^VmHWM:\s*(\d+) kB", told, re.MULTILINE):
                        self.peak = max(self.peak, int(found[1]) * 1024)

    def stop(self) -> int:
        """The largest peak that was seen."""
        self._ended.set()
        self.join()
        return self.peak


def run_arm(arm: str, rows: Path, work: Path) -> None:
    """One arm in this process; seconds and peak memory as one line of JSON."""
    from lorakeet.train.memory import peak_bytes

    cores = len(os.sched_getaffinity(0))
    watch = WorkerWatch()
    watch.start()
    if arm == "memory":
        started = run_lorakeet(rows, work, workers="auto", packs=False)
    elif arm.startswith("lorakeet"):
        started = run_lorakeet(
            rows, work, workers=0 if "1 process" in arm else "auto",
            **(SAME_WORK if "same work" in arm else {}),
        )  # fmt: skip
    else:
        started = run_trl(rows, work, num_proc=cores if "core" in arm else None)
    wall, processor = (now - then for now, then in zip(read_clocks(), started, strict=True))
    print("\n" + json.dumps({"seconds": wall, "processor_seconds": processor,
                             "peak": peak_bytes(), "worker_peak": watch.stop()}))  # fmt: skip


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


def measure_growth(folder: Path, sizes: list[int]) -> list[str]:
    """Seconds and peak memory of the data stage by rows, as a table and a picture."""
    table = ["", "## The data stage as rows grow", "",
             "| rows | file MiB | seconds | rows/s | peak MiB | peak of a worker MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    found = []
    for size in sizes:
        rows = folder / f"{size}.jsonl"
        write_rows(rows, size)
        seen = start_arm("memory", rows)
        found.append(seen)
        table.append(
            f"| {size:,} | {rows.stat().st_size / 2**20:.0f} | {seen['seconds']:.1f} | "
            f"{size / seen['seconds']:,.0f} | "
            f"{seen['peak'] / 2**20:.0f} | {seen['worker_peak'] / 2**20:.0f} |"
        )
        print(table[-1], flush=True)
        rows.unlink()
    draw_growth(sizes, found, RESULTS / "data_feeding.png")
    grown = (found[-1]["peak"] - found[0]["peak"]) / (sizes[-1] - sizes[0] or 1)
    return [*table, "", f"From {sizes[0]:,} to {sizes[-1]:,} rows the peak grows by {grown:.0f} "
            "bytes a row. Made by `python -m benchmarks.data_feeding`."]  # fmt: skip


def draw_growth(sizes: list[int], found: list[dict[str, float]], path: Path) -> None:
    """Seconds and peak memory over rows, both axes by tens."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    seconds = [seen["seconds"] for seen in found]
    left.loglog(sizes, seconds, "o-", label="measured")
    line = [seconds[-1] * size / sizes[-1] for size in sizes]
    left.loglog(sizes, line, "k:", label="linear in rows")
    left.set(xlabel="rows", ylabel="seconds")
    left.legend()
    right.semilogx(sizes, [seen["peak"] / 2**20 for seen in found], "o-", label="main process")
    right.semilogx(sizes, [seen["worker_peak"] / 2**20 for seen in found], "s-", label="a worker")
    right.set(xlabel="rows", ylabel="peak MiB")
    right.set_ylim(bottom=0)
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs all arms in turn, then the sizes, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--growth", type=int, nargs="*", default=[1_000, 10_000, 100_000],
                        help="rows of the growth table; add 1000000 for the long one")  # fmt: skip
    parser.add_argument("--arm", help="run one arm in this process")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    if asked.arm:
        run_arm(asked.arm, asked.file, asked.work)
        return
    folder = Path(tempfile.mkdtemp())
    table = compare_speed(folder, asked.rows, asked.repeats) if asked.repeats else []
    table += measure_growth(folder, asked.growth) if asked.growth else []
    shutil.rmtree(folder)
    print("\n".join(table))
    write_text(RESULTS / "data_feeding.md", "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
