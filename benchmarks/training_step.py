"""One training step against the peers, interleaved, on the same rows and machine.

    python -m benchmarks.training_step [--layers 30] [--steps 4] [--repeats 3] [--prefix 60]

Work: a system prompt of ``--prefix`` tokens that all rows share, then lognormal(median 180,
sigma 0.6) tokens, 40 % prompt and 60 % answer, at most 512; loss on the answer; LoRA r = 16,
alpha = 32 on all linear layers; AdamW; 8 rows a step; SmolLM2-135M's shape with random weights.
Ours runs through ``lorakeet.train``; the peers are PEFT + Trainer and TRL, each in a process of
its own, without gradient checkpointing.  Real tokens a second over the steps after the first.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lorakeet.base.run_folder import write_text

SHARED = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "smollm2-135m-instruct"
RESULTS = Path(__file__).parent / "results"
ARMS = ("lorakeet", "trainer", "trainer-grouped", "trl-packing")
WORDS = "time year people way day man thing woman life child world school state family".split()
ROWS, ROWS_PER_STEP, PACK_TOKENS = 400, 8, 1024


def write_work(work: Path, layers: int, prefix: int) -> None:
    """A model of the shape with random weights, and rows as chats."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = json.loads((SHARED / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**config, "num_hidden_layers": layers}))
    model.to(torch.bfloat16).save_pretrained(work / "base")
    AutoTokenizer.from_pretrained(SHARED).save_pretrained(work / "base")
    rng = random.Random(0)
    system = " ".join(rng.choices(WORDS, k=max(1, prefix - 8)))
    lines = []
    for _ in range(ROWS):
        tokens = min(512 - prefix, max(10, int(rng.lognormvariate(5.19, 0.6))))
        prompt = rng.choices(WORDS, k=int(0.4 * tokens))
        answer = rng.choices(WORDS, k=int(0.6 * tokens))
        messages = [{"role": "system", "content": system},
                    {"role": "user", "content": " ".join(prompt) or "time"},
                    {"role": "assistant", "content": " ".join(answer)}]  # fmt: skip
        lines.append(json.dumps({"messages": messages}) + "\n")
    (work / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


def recipe_of(work: Path, steps: int) -> dict[str, Any]:
    """The default recipe, but for what makes the work the same as the peers'."""
    return {
        "base": str(work / "base"),
        "data": {"train": str(work / "rows.jsonl"), "validation": 0, "deduplicate": False},
        "method": {"rank": 16, "alpha": 32},
        "train": {"batch_size": ROWS_PER_STEP, "max_steps": steps, "epochs": 10},
    }


def run_lorakeet(work: Path, steps: int) -> dict[str, float]:
    """Our arm, as a user would run it."""
    import lorakeet as lk
    from lorakeet.base.events import read_events

    folder = work / f"run-{time.time_ns()}"
    lk.train(recipe_of(work, steps), folder)
    done = [e for e in read_events(folder / "events.jsonl") if e["kind"] == "step"][1:]
    return {"tokens": sum(e["num_tokens"] for e in done),
            "seconds": sum(e["duration_s"] for e in done)}  # fmt: skip


def encoded_rows(work: Path) -> list[dict[str, list[int]]]:
    """Our own ids and targets of the rows, so that all arms train the same tokens."""
    from lorakeet.base.recipe_file import recipe_from_dict
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.load import read_tokenizer

    recipe = recipe_from_dict(recipe_of(work, 1))
    folder = Path(tempfile.mkdtemp(dir=work))
    data = prepare_data(recipe, read_tokenizer(recipe.base), folder, lambda kind, **fields: None)
    samples = [data.train[row] for row in range(len(data.train))]
    return [
        {"input_ids": s.ids.tolist(),
         "labels": [int(i) if m else -100 for i, m in zip(s.ids, s.mask, strict=True)]}
        for s in samples
    ]  # fmt: skip


def run_peer(arm: str, work: Path, steps: int) -> dict[str, float]:
    """PEFT with Trainer or TRL on the same rows."""
    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    rows = Dataset.from_list(encoded_rows(work))
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    seen: list[int] = []
    marks: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            marks.append((time.perf_counter(), sum(seen)))

    options = {"output_dir": str(work / arm), "max_steps": steps, "learning_rate": 2e-4,
               "report_to": [], "save_strategy": "no", "logging_strategy": "no", "use_cpu": True,
               "disable_tqdm": True, "gradient_checkpointing": False, "seed": 0,
               "dataloader_pin_memory": False}  # fmt: skip
    build = build_trl if arm == "trl-packing" else build_trainer
    trainer = build(arm, model, lora, tokenizer, rows, options)
    collate = trainer.data_collator

    def count(features: list[Any]) -> Any:
        seen.append(sum(len(feature["input_ids"]) for feature in features))
        return collate(features)

    trainer.data_collator = count
    trainer.add_callback(Clock())
    trainer.train()
    # the loader fetches one batch ahead: tokens of the timed steps are those fetched between marks
    return {"tokens": marks[-1][1] - marks[0][1], "seconds": marks[-1][0] - marks[0][0]}


def build_trainer(
    arm: str, model: Any, lora: Any, tokenizer: Any, rows: Any, options: dict[str, Any]
) -> Any:
    """PEFT + Trainer with padded batches, random or grouped by length."""
    import peft
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    if arm == "trainer-grouped":
        options = {**options, "train_sampling_strategy": "group_by_length"}
    return Trainer(
        model=peft.get_peft_model(model, lora),
        args=TrainingArguments(per_device_train_batch_size=ROWS_PER_STEP, **options),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )


def build_trl(
    arm: str, model: Any, lora: Any, tokenizer: Any, rows: Any, options: dict[str, Any]
) -> Any:
    """TRL's SFTTrainer with packing."""
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(
            packing=True,
            max_length=PACK_TOKENS,
            per_device_train_batch_size=2,
            bf16=False,
            **options,
        ),  # fmt: skip
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )


def run_arm(arm: str, work: Path, steps: int) -> None:
    """One arm in this process; its figures as one line of JSON."""
    found = run_lorakeet(work, steps) if arm == "lorakeet" else run_peer(arm, work, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\n" + json.dumps({"tokens_per_s": found["tokens"] / found["seconds"], "peak": peak}))


def main() -> None:
    """Runs all arms in turn and writes the ratio table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefix", type=int, default=60)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--arm", help="run one arm in this process")
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    if asked.arm:
        run_arm(asked.arm, asked.work, asked.steps)
        return
    work = Path(tempfile.mkdtemp())
    write_work(work, asked.layers, asked.prefix)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in asked.arms}
    for _ in range(asked.repeats):
        for arm in asked.arms:
            command = [sys.executable, "-m", "benchmarks.training_step", "--arm", arm,
                       "--work", str(work), "--steps", str(asked.steps)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{arm}: {done.stderr[-2000:]}")
            found[arm].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(arm, found[arm][-1], flush=True)
    shutil.rmtree(work)
    write_table(asked, found)


def write_table(asked: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and how many times ours is faster and leaner."""
    speed = {a: statistics.median(r["tokens_per_s"] for r in runs) for a, runs in found.items()}
    peak = {a: statistics.median(r["peak"] for r in runs) for a, runs in found.items()}
    table = [
        f"# A training step: SmolLM2-135M's shape, {asked.layers} layers, prefix {asked.prefix}",
        "",
        "| | tokens/s (range) | ours is faster by | peak GiB | ours takes |",
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
              "made by `python -m benchmarks.training_step`."]  # fmt: skip
    print("\n".join(table))
    name = f"training_step_{asked.layers}_layers_prefix_{asked.prefix}.md"
    write_text(RESULTS / name, "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
