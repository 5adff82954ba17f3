"""One training step against the peers, interleaved, on the same rows and machine.

    python -m benchmarks.training_step [--shape 135m] [--steps 6] [--repeats 3] [--prefix 60]
    python -m benchmarks.training_step --profile [--shape 0.5b] [--layers 6]

Work: a system prompt of ``--prefix`` tokens that all rows share, then lognormal(median 180,
sigma 0.6) tokens, 40 % prompt and 60 % answer, at most 512; loss on the answer; LoRA r = 16,
alpha = 32 on all linear layers; AdamW; 8 rows a step, and as many rows as the steps take, so
that a run is one epoch (grouped by length, the longest come first); random weights of
SmolLM2-135M's or Qwen2.5-0.5B's shape; TRL's packs have 1024 tokens, and 2048 from a prefix
of 300 on, as ours then have.  Ours runs through ``lorakeet.train``; the peers are PEFT +
Trainer and TRL, each in a process of its own, without gradient checkpointing.  Real tokens a
second over the steps after the first.

The floor is 4 N FLOP for each real token (forward 2 N, backward to the input 2 N, N weights
that are multiplied) at the rate of a large float32 matmul, measured after each arm; whoever
computes fewer tokens (a shared prefix) or fewer logits (only those of targets) may pass it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arms import Figures, run_ours, run_timed, take_turns
from benchmarks.step_profile import profile_step
from lorakeet.base.run_folder import write_text

SHARED = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "smollm2-135m-instruct"
RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "135m": ("SmolLM2-135M", {}),  # the configuration beside the tokenizer
    "0.5b": ("Qwen2.5-0.5B", {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }),
}  # fmt: skip
ARMS = ("lorakeet", "trainer", "trainer-grouped", "trl-packing")
WORDS = "time year people way day man thing woman life child world school state family".split()
ROWS_PER_STEP, LONG_PREFIX, TOKENS_PER_STEP = 8, 300, 2048
MATMUL_SIZE = 2048


def write_work(work: Path, shape: str, layers: int | None, prefix: int, steps: int) -> None:
    """A model of the shape with random weights, and the rows of one epoch as chats."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    settings = SHAPES[shape][1] or json.loads((SHARED / "config.json").read_text(encoding="utf-8"))
    if layers:
        settings = {**settings, "num_hidden_layers": layers}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    model.to(torch.bfloat16).save_pretrained(work / "base")
    write_text(work / "work.json", json.dumps({"prefix": prefix, "num_multiplied": count(model)}))
    AutoTokenizer.from_pretrained(SHARED).save_pretrained(work / "base")
    rng = random.Random(0)
    system = " ".join(rng.choices(WORDS, k=max(1, prefix - 8)))
    lines = []
    for _ in range(ROWS_PER_STEP * steps):
        tokens = min(512 - prefix, max(10, int(rng.lognormvariate(5.19, 0.6))))
        prompt = rng.choices(WORDS, k=int(0.4 * tokens))
        answer = rng.choices(WORDS, k=int(0.6 * tokens))
        messages = [{"role": "system", "content": system},
                    {"role": "user", "content": " ".join(prompt) or "time"},
                    {"role": "assistant", "content": " ".join(answer)}]  # fmt: skip
        lines.append(json.dumps({"messages": messages}) + "\n")
    (work / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


def count(model: Any) -> int:
    """N: the elements of all matrices that a token is multiplied with, the head among them."""
    tied = {id(p) for p in model.get_output_embeddings().parameters()}
    embedding = model.get_input_embeddings().weight
    skipped = set() if id(embedding) in tied else {id(embedding)}
    return sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in skipped)


def recipe_of(work: Path, steps: int) -> dict[str, Any]:
    """The default recipe, but for what makes the work the same as the peers'."""
    return {
        "base": str(work / "base"),
        "data": {"train": str(work / "rows.jsonl"), "validation": 0, "deduplicate": False},
        "method": {"rank": 16, "alpha": 32},
        "train": {"batch_size": ROWS_PER_STEP, "max_steps": steps, "epochs": 10},
    }


def run_lorakeet(work: Path, steps: int) -> Figures:
    """Our arm."""
    return run_ours(recipe_of(work, steps), work)


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


def run_peer(arm: str, work: Path, steps: int) -> Figures:
    """PEFT with Trainer or TRL on the same rows."""
    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = Dataset.from_list(encoded_rows(work))
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"output_dir": str(work / arm), "max_steps": steps, "learning_rate": 2e-4,
               "report_to": [], "save_strategy": "no", "logging_strategy": "no", "use_cpu": True,
               "disable_tqdm": True, "gradient_checkpointing": False, "seed": 0,
               "dataloader_pin_memory": False}  # fmt: skip
    build = build_trl if arm == "trl-packing" else build_trainer
    return run_timed(build(arm, model, lora, tokenizer, rows, options))


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

    work = json.loads((Path(options["output_dir"]).parent / "work.json").read_text())
    packs = 1 if work["prefix"] >= LONG_PREFIX else 2
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            packing=True,
            max_length=TOKENS_PER_STEP // packs,
            per_device_train_batch_size=packs,
            bf16=False,
            **options,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )


def run_arm(arm: str, work: Path, steps: int) -> None:
    """One arm in this process; its figures as one line of JSON."""
    from lorakeet.train.memory import peak_bytes

    found = run_lorakeet(work, steps) if arm == "lorakeet" else run_peer(arm, work, steps)
    tokens_per_s, peak = found["tokens"] / found["seconds"], peak_bytes()
    flops_per_s = measure_matmul_rate()
    print("\n" + json.dumps({"tokens_per_s": tokens_per_s, "peak": peak, "rate": flops_per_s}))


def measure_matmul_rate() -> float:
    """FLOP/s of a large float32 matmul, the best of six."""
    import torch

    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * MATMUL_SIZE**3 / min(seconds)


def main() -> None:
    """Runs all arms in turn and writes the ratio table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, for a quick look")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefix", type=int, default=60)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--profile", action="store_true", help="where our step's time goes")
    parser.add_argument("--arm", help="run one arm in this process")
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    if asked.arm:
        run_arm(asked.arm, asked.work, asked.steps)
        return
    work = Path(tempfile.mkdtemp())
    try:
        write_work(work, asked.shape, asked.layers, asked.prefix, asked.steps)
        if asked.profile:
            print("\n".join(profile_step(lambda: run_lorakeet(work, asked.steps))))
        else:
            write_table(
                asked, take_turns("benchmarks.training_step", asked.arms, work, asked), work
            )
    finally:
        shutil.rmtree(work)


def write_table(
    asked: argparse.Namespace, found: dict[str, list[dict[str, float]]], work: Path
) -> None:
    """Medians, how many times ours is faster and leaner, and the share of the floor."""
    speed = {a: statistics.median(r["tokens_per_s"] for r in runs) for a, runs in found.items()}
    peak = {a: statistics.median(r["peak"] for r in runs) for a, runs in found.items()}
    rate = statistics.median(r["rate"] for runs in found.values() for r in runs)
    num_multiplied = json.loads((work / "work.json").read_text())["num_multiplied"]
    floor = rate / (4 * num_multiplied)
    layers = f", {asked.layers} layers" if asked.layers else ""
    ours = next(iter(found))  # Lorakeet, unless it was left out
    table = [
        f"# A training step: {SHAPES[asked.shape][0]}'s shape{layers}, prefix {asked.prefix}",
        "",
        f"| | tokens/s (range) | {ours} is faster by | of the floor | peak GiB | {ours} takes |",
        "|---|---|---|---|---|---|",
    ]
    for arm, runs in found.items():
        low, high = (f(r["tokens_per_s"] for r in runs) for f in (min, max))
        table.append(
            f"| {arm} | {speed[arm]:.0f} ({low:.0f} to {high:.0f}) | "
            f"{speed[ours] / speed[arm]:.2f}x | {100 * speed[arm] / floor:.0f} % | "
            f"{peak[arm] / 2**30:.2f} | 1/{peak[arm] / peak[ours]:.1f} |"
        )
    table += ["", f"Floor: 4 N FLOP a token with N = {num_multiplied / 1e6:.0f} M at "
              f"{rate / 1e9:.0f} GFLOP/s is {floor:.0f} tokens/s.", "",
              f"Medians of {asked.repeats} interleaved runs of {asked.steps} steps, 2 cores; "
              "made by `python -m benchmarks.training_step`."]  # fmt: skip
    print("\n".join(table))
    name = f"training_step_{asked.shape}{layers.replace(', ', '_').replace(' ', '_')}"
    write_text(RESULTS / f"{name}_prefix_{asked.prefix}.md", "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
