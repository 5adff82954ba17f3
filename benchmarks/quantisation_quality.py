"""What few bits cost in quality, on real models and real data.

    python -m benchmarks.quantisation_quality qlora [--rows 1200] [--seeds 3]

``qlora``: all-MiniLM-L6-v2 learns SST-2 with LoRA on all linear layers of a base in 32 bits
and of the same base in NF4, with the same seeds; accuracy on the development set.

Each part writes its own file of ``results/``.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from benchmarks.encoder_recipe import find_encoder, run_once, write_splits
from lorakeet.base.run_folder import write_text

RESULTS = Path(__file__).parent / "results"
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


def main() -> None:
    """Runs a part and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["qlora"])
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    lines = compare_qlora(asked.rows, asked.epochs, asked.seeds)
    write_text(RESULTS / f"quantisation_quality_{asked.part}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
