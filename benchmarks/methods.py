"""Every training method on real text: score, size, time, memory and forgetting.

    python -m benchmarks.methods [--quick] [NAME ...]

A real Llama of 260,032 parameters that its author trained on TinyStories learns
Shakespeare through ``train_model``.  The score is the perplexity of passages that are never
trained; forgetting is how far the loss on held-out stories rises, in nats a token.  Each
method's rate is the best of one small grid by the first seed; the table shows the mean and
the spread (highest less lowest) over all seeds.  With names only those rows are run, and the
others stay in the table as they are.

Every run is a process of its own, forked from one that holds model and data, so that its
peak memory is its own: what is shown is how far its resident peak lies above its start.
Time is that of the processor, on one thread, so a busy machine hardly changes it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from lorakeet.base.recipe import Recipe
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.records import Validation
from lorakeet.base.run_folder import RunFolder, write_text
from lorakeet.data.prepare import PreparedData, prepare_data
from lorakeet.evaluate.perplexity import measure_perplexity
from lorakeet.models.load import load_model
from lorakeet.models.methods import METHODS, apply_method
from lorakeet.train.fit import train_model
from lorakeet.train.loop import TrainJob
from lorakeet.train.memory import peak_bytes

SHARED = Path(__file__).resolve().parents[2] / "shared"
BASE = SHARED / "models" / "tinyllama-stories-260k"
RESULTS = Path(__file__).parent / "results"
PASSAGE = 300  # characters, about 130 tokens of this model
RANK, VERA_RANK = 8, 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is run."""

    rows: int
    held: int
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


QUICK = Size(rows=128, held=24, steps=12, rates=(2e-3, 8e-3, 3.2e-2), seeds=(0, 1))
WHOLE = Size(rows=320, held=32, steps=40, rates=(1e-3, 3e-3, 1e-2, 3e-2), seeds=(0, 1, 2))
ROWS = {
    name: ("nf4" if row.options.get("start") == "loftq" else "", dict(row.options))
    for name, row in METHODS.items()
}
ROWS.pop("lora and biases")  # this Llama has none
ROWS |= {"lora on nf4": ("nf4", {"kind": "lora"})}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every run shares, loaded once."""

    size: Size
    work: Path
    models: dict[str, Any]  # kind of quantisation, or "" for none -> the base
    tokenizer: Any
    data: PreparedData
    stories: PreparedData


def write_passages(path: Path, texts: list[str]) -> str:
    """Texts as rows of JSON; returns the path for a recipe."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def read_shakespeare(count: int) -> list[str]:
    """Passages from the start of the plays, in their order."""
    with gzip.open(SHARED / "data/tinyshakespeare/input.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read(count * PASSAGE)
    return [text[start : start + PASSAGE].strip() for start in range(0, len(text), PASSAGE)]


def read_stories(count: int) -> list[str]:
    """The beginnings of stories that the base was not trained on."""
    with gzip.open(SHARED / "data/tinystories/valid.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"][:PASSAGE] for line, _ in zip(file, range(count))]  # noqa: B905


def make_recipe(
    bench_data: dict[str, Any], size: Size, row: tuple[str, dict], rate: float, seed: int
) -> Recipe:
    """One run's recipe."""
    kind, options = row
    method = {"rank": RANK, "alpha": 2 * RANK, **options}
    method = options if options["kind"] == "full" else method
    if options.get("vera"):  # it has no alpha, and r vectors cost little
        method = {**options, "rank": VERA_RANK}
    return recipe_from_dict({
        "base": str(BASE), "task": "text", "data": {**bench_data, "max_tokens": 256},
        "method": method, "quantization": {"kind": kind or "none"},
        "train": {"learning_rate": rate, "max_steps": size.steps, "epochs": 50, "batch_size": 8,
                  "seed": seed, "early_stopping": None, "evaluate_every_steps": size.steps,
                  "checkpoint_every_steps": 10 * size.steps},
    })  # fmt: skip


def open_bench(size: Size, work: Path) -> Bench:
    """Base and data; the held-out passages come from other scenes than the trained ones."""
    passages = read_shakespeare(size.rows + size.held)
    data = {
        "train": write_passages(work / "train.jsonl", passages[: size.rows]),
        "validation": write_passages(work / "held.jsonl", passages[size.rows :]),
    }
    told = write_passages(work / "stories.jsonl", read_stories(size.held))
    kinds = {kind for kind, _ in ROWS.values()}
    loaded = {k: load_model(str(BASE), dtype="float32", quantization=k or None) for k in kinds}
    tokenizer = loaded[""][1]
    recipe = make_recipe(data, size, ROWS["full"], 1e-3, 0)
    stories = make_recipe({"train": told, "validation": 0}, size, ROWS["full"], 1e-3, 0)
    return Bench(
        size=size, work=work, tokenizer=tokenizer,
        models={kind: model for kind, (model, _) in loaded.items()},
        data=prepare_data(recipe, tokenizer, work / "data", _ignore),
        stories=prepare_data(stories, tokenizer, work / "stories", _ignore),
    )  # fmt: skip


def run_once(bench: Bench, row: tuple[str, dict], rate: float, seed: int) -> dict[str, float]:
    """One training run in a process of its own, and what it measured."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_train, args=(bench, row, rate, seed, there))
    child.start()
    there.close()
    try:
        return {"rate": rate, **here.recv()}
    except EOFError as error:
        raise SystemExit(f"{row} at {rate}: the run ended without a result.") from error
    finally:
        child.join()


def _train(bench: Bench, row: tuple[str, dict], rate: float, seed: int, answer: Any) -> None:
    """The child: trains, measures, and sends what it found."""
    start_bytes, pad_id = peak_bytes() or 0, bench.tokenizer.pad_token_id or 0
    recipe = make_recipe({"train": "-", "validation": "-"}, bench.size, row, rate, seed)
    model, held, told = bench.models[row[0]], bench.data.validation, bench.stories.train
    before = measure_perplexity(model, told, pad_id)["loss"]
    report = apply_method(model, recipe.method, task="text", seed=seed, base=str(BASE))
    run = RunFolder(Path(tempfile.mkdtemp(dir=bench.work)))
    job = TrainJob(model=model, recipe=recipe, data=bench.data, run=run, pad_id=pad_id)
    started_s = time.process_time()
    train_model(job, emit=_ignore, validate=lambda: Validation(values={}))
    duration_s = time.process_time() - started_s
    answer.send({
        "score": measure_perplexity(model, held, pad_id)["perplexity"],
        "forgetting": measure_perplexity(model, told, pad_id)["loss"] - before,
        "trained": report.trained_parameters, "duration_s": duration_s,
        "peak_bytes": (peak_bytes() or 0) - start_bytes,
    })  # fmt: skip


def _ignore(kind: str, **fields: Any) -> None:
    """Hears events and keeps none."""


def measure_method(bench: Bench, row: tuple[str, dict]) -> dict[str, Any]:
    """The best rate by the first seed, and all seeds at it."""
    first, *others = bench.size.seeds
    tried = [run_once(bench, row, rate, first) for rate in bench.size.rates]
    best = min(tried, key=lambda run: run["score"])
    runs = [best, *(run_once(bench, row, best["rate"], seed) for seed in others)]
    ends = (min(bench.size.rates), max(bench.size.rates))
    return {"rate": best["rate"], "edge": best["rate"] in ends, "runs": runs}


def to_row(name: str, found: dict[str, Any]) -> str:
    """A method's line of the table."""
    runs = found["runs"]

    def told(key: str, form: str) -> str:
        values = [run[key] for run in runs]
        return f"{mean(values):{form}} ± {max(values) - min(values):{form}}"

    peak = mean(run["peak_bytes"] for run in runs) / 2**20
    rate = f"{found['rate']:g}{' (edge)' if found['edge'] else ''}"
    return (
        f"| {name} | {told('score', '.2f')} | {runs[0]['trained']:,} | {rate} | "
        f"{told('duration_s', '.2f')} | {peak:.1f} | {told('forgetting', '.3f')} |"
    )


def read_rows(path: Path) -> dict[str, str]:
    """Method -> its line of a table that was written before."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    told = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    return {name: line for name, line in told.items() if name in ROWS}


def main() -> None:
    """Runs every method, or those that are named, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, steps, rates and seeds")
    parser.add_argument("methods", nargs="*", help="rows to run; all when none is named")
    asked = parser.parse_args()
    size = QUICK if asked.quick else WHOLE
    file = RESULTS / ("methods-quick.md" if asked.quick else "methods.md")
    torch.set_num_threads(1)  # a forked process cannot take its parent's threads along
    work = Path(tempfile.mkdtemp())
    bench = open_bench(size, work)
    before = measure_perplexity(
        bench.models[""], bench.data.validation, bench.tokenizer.pad_token_id or 0
    )
    kind = " (the quick form)" if size is QUICK else ""
    rates = ", ".join(f"{rate:g}" for rate in size.rates)
    lines = [
        f"# Methods on real text{kind}", "",
        f"TinyStories' 260,032-parameter Llama learns {size.rows:,} passages of Shakespeare: "
        f"{size.steps} steps of 8, rank {RANK}, alpha {2 * RANK}, rates {rates}, "
        f"{len(size.seeds)} seeds; {size.held} held-out passages and as many stories.  Before, "
        f"the perplexity of the held-out passages is {before['perplexity']:.2f}.  ± is the spread "
        "over the seeds.", "",
        "| method | perplexity | trained | rate | seconds | peak MiB | forgetting |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    command = "python -m benchmarks.methods" + (" --quick" if size is QUICK else "")
    last = (
        f"Made by `{command}` on one thread.  Seconds are processor time of training.  Forgetting: "
        "nats a token that the loss on stories rises.  (edge): the best rate lies at an end of the "
        "grid."
    )
    done = read_rows(file) if asked.methods else {}
    for name in asked.methods or ROWS:
        done[name] = to_row(name, measure_method(bench, ROWS[name]))
        print(done[name], flush=True)
        rows = [done[each] for each in ROWS if each in done]
        write_text(file, "\n".join([*lines, *rows, "", last]) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
