"""BERT-base learns to classify film reviews: packed, against padded to 256 and to the longest.

    python -m benchmarks.encoder_packing [--layers 12] [--steps 4] [--repeats 3]

Work: IMDb reviews as they come, cut at 256 tokens in all arms; BERT-base's shape with random
weights; LoRA r = 16, alpha = 32 on all linear layers and a new head; AdamW; 16 rows a step.
Ours runs through ``lorakeet.train`` with its default recipe; the peer is PEFT with Trainer,
its rows padded to 256 or to the longest of a batch, without gradient checkpointing.  Each arm
is a process of its own; real tokens a second over the steps after the first.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import shutil
import statistics
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.arms import Figures, run_ours, run_timed, take_turns
from benchmarks.encoder_recipe import find_encoder
from lorakeet.base.run_folder import write_text

IMDB = Path(__file__).resolve().parents[2] / "shared" / "measure_only" / "imdb" / "train.jsonl.xz"
RESULTS = Path(__file__).parent / "results"
ARMS = ("lorakeet", "padded to 256", "padded to the longest")
ROWS, ROWS_PER_STEP, MAX_TOKENS = 320, 16, 256
LABELS = ("negative", "positive")


def write_work(work: Path, layers: int) -> None:
    """An encoder of the shape with random weights, and reviews with their labels."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(num_hidden_layers=layers)).save_pretrained(work / "base")
    AutoTokenizer.from_pretrained(find_encoder()).save_pretrained(work / "base")
    with lzma.open(IMDB, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 25_000)]
    lines = [
        json.dumps({"text": row["text"], "label": LABELS["pos" in row["id"]]}) + "\n"
        for row in random.Random(0).sample(rows, ROWS)
    ]
    (work / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


def recipe_of(work: Path, steps: int) -> dict[str, Any]:
    """The default recipe, but for what makes the work the same as the peers'."""
    return {
        "base": str(work / "base"), "task": "classify",
        "data": {"train": str(work / "rows.jsonl"), "validation": 0, "labels": list(LABELS),
                 "max_tokens": MAX_TOKENS, "too_long": "cut", "deduplicate": False},
        "method": {"rank": 16, "alpha": 32},
        "train": {"batch_size": ROWS_PER_STEP, "max_steps": steps, "epochs": 10},
    }  # fmt: skip


def run_lorakeet(work: Path, steps: int) -> Figures:
    """Our arm."""
    return run_ours(recipe_of(work, steps), work)


def encoded_rows(work: Path) -> list[dict[str, Any]]:
    """Our own ids and labels of the rows, so that all arms train the same tokens."""
    from lorakeet.base.recipe_file import recipe_from_dict
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.load import read_tokenizer

    recipe = recipe_from_dict(recipe_of(work, 1))
    folder = Path(tempfile.mkdtemp(dir=work))
    data = prepare_data(recipe, read_tokenizer(recipe.base), folder, lambda kind, **fields: None)
    samples = [data.train[row] for row in range(len(data.train))]
    return [{"input_ids": s.ids.tolist(), "labels": s.label} for s in samples]


def run_peer(arm: str, work: Path, steps: int) -> dict[str, float]:
    """PEFT with Trainer on the same rows."""
    import peft
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    model = AutoModelForSequenceClassification.from_pretrained(
        work / "base", num_labels=len(LABELS), dtype=torch.float32
    )
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    padding = {"padding": "max_length", "max_length": MAX_TOKENS} if "256" in arm else {}
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(work / "base"), **padding)
    model = peft.get_peft_model(model, lora)
    options = TrainingArguments(
        output_dir=str(work / "peer"), per_device_train_batch_size=ROWS_PER_STEP, max_steps=steps,
        learning_rate=2e-4, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True,
        disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = Dataset.from_list(encoded_rows(work))
    return run_timed(Trainer(model=model, args=options, train_dataset=rows, data_collator=collate))


def run_arm(arm: str, work: Path, steps: int) -> None:
    """One arm in this process; its figures as one line of JSON."""
    from lorakeet.train.memory import peak_bytes

    found = run_lorakeet(work, steps) if arm == "lorakeet" else run_peer(arm, work, steps)
    rate = found["tokens"] / found["seconds"]
    print("\n" + json.dumps({"tokens_per_s": rate, "peak": peak_bytes()}))


def main() -> None:
    """Runs all arms in turn and writes the ratio table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--arm", help="run one arm in this process")
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    if asked.arm:
        run_arm(asked.arm, asked.work, asked.steps)
        return
    work = Path(tempfile.mkdtemp())
    write_work(work, asked.layers)
    found = take_turns("benchmarks.encoder_packing", asked.arms, work, asked)
    shutil.rmtree(work)
    write_table(asked, found)


def write_table(asked: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and how many times ours is faster and leaner."""
    speed = {a: statistics.median(r["tokens_per_s"] for r in runs) for a, runs in found.items()}
    peak = {a: statistics.median(r["peak"] for r in runs) for a, runs in found.items()}
    table = [
        f"# Classification with BERT-base's shape, {asked.layers} layers, IMDb cut at {MAX_TOKENS}",
        "",
        "| | real tokens/s (range) | ours is faster by | peak GiB | ours takes |",
        "|---|---|---|---|---|",
    ]
    for arm, runs in found.items():
        low, high = (f(r["tokens_per_s"] for r in runs) for f in (min, max))
        table.append(
            f"| {arm} | {speed[arm]:.0f} ({low:.0f} to {high:.0f}) | "
            f"{speed['lorakeet'] / speed[arm]:.2f}x | {peak[arm] / 2**30:.2f} | "
            f"{peak['lorakeet'] / peak[arm]:.2f} |"
        )
    table += ["", f"Medians of {asked.repeats} interleaved runs of {asked.steps} steps, 2 cores; "
              "made by `python -m benchmarks.encoder_packing`."]  # fmt: skip
    print("\n".join(table))
    write_text(RESULTS / f"encoder_packing_{asked.layers}_layers.md", "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
