"""What few bits cost in quality, on real models and real data.

    python -m benchmarks.quantisation_quality qlora [--rows 1200] [--seeds 3]
    python -m benchmarks.quantisation_quality mixed [--rows 100]

``qlora``: all-MiniLM-L6-v2 learns SST-2 with LoRA on all linear layers of a base in 32 bits
and of the same base in NF4, with the same seeds; accuracy on the development set.

``mixed``: real decoders of stories, held in uniform and in mixed widths; perplexity on stories
that they have not been ranked with.  A mix gets the bytes of the uniform form that it stands
beside, or fewer: 4.5 bits are NF4 in blocks of 64 with float32 scales.

Each part writes its own file of ``results/``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import shutil
import statistics
import tempfile
from itertools import islice
from pathlib import Path
from typing import TextIO

from benchmarks.encoder_recipe import find_encoder, run_once, write_splits
from lorakeet.api.widths import measure_widths
from lorakeet.base.events import ignore_events
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.recipe import Recipe
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.run_folder import write_text
from lorakeet.data.prepare import PreparedData, prepare_data
from lorakeet.evaluate.perplexity import measure_perplexity
from lorakeet.models.load import load_model, read_tokenizer
from lorakeet.quant.linear import QuantizedLinear

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).resolve().parents[2] / "shared"
DECODERS = {"tinyllama-stories-260k": 400, "babyllama-stories-361": 240}  # characters of a row
UNIFORM = {
    "NF4, scales in 8 bits": {"kind": "nf4"},
    "NF4, scales in 32 bits": {"kind": "nf4", "double": False},
    "INT8": {"kind": "int8"},
}
BUDGETS = (4.5, 5.0, 6.0)
METHOD = {"kind": "lora", "rank": 8, "alpha": 16}
RATE = 1.5e-3  # the better one for LoRA in benchmarks.encoder_recipe


def compare_qlora(rows: int, epochs: float, seeds: int) -> list[str]:
    """The table of LoRA against QLoRA."""
    base, work = find_encoder(), Path(tempfile.mkdtemp())
    write_splits(work, rows)
    accuracy: dict[str, list[float]] = {"none": [], "nf4": []}
    for seed in range(seeds):
        for kind, found in accuracy.items():
            train = {"learning_rate": RATE, "epochs": epochs, "seed": seed}
            run = run_once(work, base, METHOD, train, quantization=kind)
            found.append(100 * run["dev"])
            print(seed, kind, round(found[-1], 2), round(run["duration_s"]), flush=True)
    shutil.rmtree(work)
    names = {"none": "LoRA, base in 32 bits", "nf4": "QLoRA, base in NF4"}
    means = {kind: statistics.mean(found) for kind, found in accuracy.items()}
    return [
        f"# LoRA against QLoRA: all-MiniLM-L6-v2 on SST-2, {rows:,} rows, {epochs:g} epochs",
        "",
        f"| method | {' | '.join(f'seed {seed}' for seed in range(seeds))} | mean |",
        "|---|" + "---|" * (seeds + 1),
        *(
            f"| {names[kind]} | {' | '.join(f'{one:.2f} %' for one in found)} | "
            f"{means[kind]:.2f} % |"
            for kind, found in accuracy.items()
        ),
        "",
        f"QLoRA is {means['nf4'] - means['none']:+.2f} points from LoRA (development set, 872 "
        "sentences). Made by `python -m benchmarks.quantisation_quality qlora`.",
    ]


def write_stories(work: Path, rows: int, num_chars: int) -> None:
    """The openings of stories to rank with, and of others to measure on."""
    folder = SHARED / "data" / "tinystories"
    with lzma.open(folder / "train.jsonl.xz", "rt", encoding="utf-8") as file:
        _write_openings(file, work / "train.jsonl", 100, num_chars)
    with gzip.open(folder / "valid.jsonl.gz", "rt", encoding="utf-8") as file:
        _write_openings(file, work / "held.jsonl", rows, num_chars)


def _write_openings(file: TextIO, out: Path, rows: int, num_chars: int) -> None:
    texts = (json.loads(line)["text"][:num_chars] for line in islice(file, rows))
    out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def compare_mixed(rows: int) -> list[str]:
    """The table of uniform against mixed widths."""
    work = Path(tempfile.mkdtemp())
    lines = [f"# Uniform and mixed widths: perplexity on {rows} held-out stories", ""]
    for name, num_chars in DECODERS.items():
        write_stories(work, rows, num_chars)
        recipe = recipe_from_dict({
            "base": str(SHARED / "models" / name), "task": "text",
            "data": {"train": str(work / "train.jsonl"), "max_tokens": 256,
                     "validation": str(work / "held.jsonl"), "private_data": "keep"},
        })  # fmt: skip
        tokenizer = read_tokenizer(recipe.base)
        data = prepare_data(recipe, tokenizer, work / name, ignore_events)
        lines += [f"## {name}", "", "| base | bits a weight | perplexity |", "|---|---|---|"]
        for arm, settings in {"32 bits": {}, **UNIFORM}.items():
            lines.append(_row(recipe, data, arm, QuantizationSettings(**settings)))
        for bits in BUDGETS:
            settings = QuantizationSettings(kind="mixed", bits_per_weight=bits)
            found = measure_widths(recipe.model_copy(update={"quantization": settings}), data)
            widths = {layer: kept["width"] for layer, kept in found["layers"].items()}
            mixed = settings.model_copy(update={"widths": widths})
            lines.append(_row(recipe, data, f"mixed, at most {bits:g}", mixed))
        lines.append("")
    shutil.rmtree(work)
    return [*lines, "Layers are ranked on 32 other stories. Made by `python -m "
            "benchmarks.quantisation_quality mixed`."]  # fmt: skip


def _row(recipe: Recipe, data: PreparedData, arm: str, settings: QuantizationSettings) -> str:
    """Bits and perplexity of the base in one form."""
    model, tokenizer = load_model(recipe.base, task=recipe.task, quantization=settings)
    held = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    bits = 8 * sum(m.held_bytes for m in held) / max(1, sum(m.num_weights for m in held))
    found = measure_perplexity(model, data.validation, tokenizer.pad_token_id or 0)
    print(arm, bits, found, flush=True)
    return f"| {arm} | {bits or 32:.3f} | {found['perplexity']:.4f} |"


def main() -> None:
    """Runs a part and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["qlora", "mixed"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    if asked.part == "qlora":
        lines = compare_qlora(asked.rows or 1200, asked.epochs, asked.seeds)
    else:
        lines = compare_mixed(asked.rows or 100)
    write_text(RESULTS / f"quantisation_quality_{asked.part}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
