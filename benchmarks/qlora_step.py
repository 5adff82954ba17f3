"""QLoRA against LoRA and against PEFT + bitsandbytes + Trainer: speed and peak memory, one run.

    python -m benchmarks.qlora_step [--shape 0.5b] [--steps 4] [--repeats 3] [--arms ...]

Work: chats of lognormal(median 75, sigma 0.6) words of 2.4 tokens, which are 180 as in
``training_step``, 40 % prompt and 60 % answer, at most 512 tokens;
loss on the answer; r = 16, alpha = 32 on all linear layers; AdamW; 8 rows a step; the shapes of
SmolLM2-135M and Qwen2.5-0.5B with random weights, held on disk in bfloat16.  Each arm is a
process of its own and the arms take turns:

    lora         ``lorakeet.train`` on the base as it is held without quantisation
    qlora        ``lorakeet.train`` with ``quantization.kind: nf4`` (block 64, double)
    peer         PEFT + bitsandbytes (NF4, block 64, double) + Trainer, no gradient checkpointing
    peer-saving  the same with gradient checkpointing, which PEFT's own preparation turns on

Real tokens (no padding) a second over the steps after the first; the peak is the process's own
resident memory, VmHWM, from its start with all libraries.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import lorakeet
from benchmarks.arms import run_ours, run_timed, take_turns
from lorakeet.base.run_folder import write_text

RESULTS = Path(__file__).parent / "results"
STARTER = Path(lorakeet.__file__).parent / "embedded" / "starter"
OURS, PEERS = ("lora", "qlora"), ("peer", "peer-saving")
WORDS = "time year people way day man thing woman life child world school state family".split()
NUM_ROWS, ROWS_PER_STEP, MAX_WORDS = 200, 8, 210
# model type, hidden, layers, heads, key-value heads, feed-forward width, vocabulary
SHAPES = {
    "tiny": ("llama", 64, 2, 4, 2, 176, 2560),
    "135m": ("llama", 576, 30, 9, 3, 1536, 49152),
    "0.5b": ("qwen2", 896, 24, 14, 2, 4864, 151936),
}


def write_work(work: Path, shape: str) -> None:
    """A model of the shape with random weights, and rows as chats."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, hidden, layers, heads, kv_heads, ffn, vocabulary = SHAPES[shape]
    config = AutoConfig.for_model(
        kind, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=ffn, vocab_size=vocabulary,
        tie_word_embeddings=True, max_position_embeddings=2048, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(work / "base")
    for path in (*STARTER.glob("*token*"), *STARTER.glob("*.jinja")):
        shutil.copy(path, work / "base")
    rng = random.Random(0)
    rows = []
    for _ in range(NUM_ROWS):
        num = min(MAX_WORDS, max(10, int(rng.lognormvariate(4.32, 0.6))))
        turns = [("user", rng.choices(WORDS, k=int(0.4 * num))),
                 ("assistant", rng.choices(WORDS, k=int(0.6 * num)))]  # fmt: skip
        messages = [{"role": role, "content": " ".join(words)} for role, words in turns]
        rows.append(json.dumps({"messages": messages}) + "\n")
    write_text(work / "rows.jsonl", "".join(rows))


def recipe_of(work: Path, arm: str, steps: int) -> dict[str, Any]:
    """The default recipe, but for what makes the work the same as the peer's."""
    return {
        "base": str(work / "base"),
        "data": {"train": str(work / "rows.jsonl"), "validation": 0, "deduplicate": False},
        "method": {"rank": 16, "alpha": 32},
        "quantization": {"kind": "nf4" if arm == "qlora" else "none", "cache": "none"},
        "train": {"batch_size": ROWS_PER_STEP, "max_steps": steps, "epochs": 10},
        "plan": {"measure_first": False},
    }


def write_encoded(work: Path) -> None:
    """Our own ids and targets of the rows, so that all arms train the same tokens."""
    from lorakeet.base.events import ignore_events
    from lorakeet.base.recipe_file import recipe_from_dict
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.load import read_tokenizer

    recipe = recipe_from_dict(recipe_of(work, "lora", 1))
    data = prepare_data(recipe, read_tokenizer(recipe.base), work / "encoded", ignore_events)
    rows = [
        {"input_ids": s.ids.tolist(),
         "labels": [int(i) if m else -100 for i, m in zip(s.ids, s.mask, strict=True)]}
        for s in (data.train[row] for row in range(len(data.train)))
    ]  # fmt: skip
    write_text(work / "encoded.json", json.dumps(rows))


def load_peer(work: Path, *, saves_memory: bool) -> Any:
    """The base in bitsandbytes' NF4 with PEFT's adapter, as both libraries' guides load it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        work / "base", dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )  # fmt: skip
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=saves_memory)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


def run_peer(arm: str, work: Path, steps: int) -> dict[str, float]:
    """PEFT + bitsandbytes + Trainer on the same rows, padded to the longest of a batch."""
    from datasets import Dataset
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    rows = Dataset.from_list(json.loads((work / "encoded.json").read_text(encoding="utf-8")))
    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(work / "base"), padding=True)
    saves_memory = arm == "peer-saving"
    trainer = Trainer(
        model=load_peer(work, saves_memory=saves_memory),
        args=TrainingArguments(
            output_dir=str(work / arm), max_steps=steps, learning_rate=2e-4, report_to=[],
            per_device_train_batch_size=ROWS_PER_STEP, save_strategy="no", seed=0, use_cpu=True,
            logging_strategy="no", disable_tqdm=True, gradient_checkpointing=saves_memory,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows, data_collator=collate,
    )  # fmt: skip
    return run_timed(trainer)


def run_arm(arm: str, work: Path, steps: int) -> None:
    """One arm in this process; its figures as one line of JSON."""
    from lorakeet.train.memory import peak_bytes

    found = (
        run_ours(recipe_of(work, arm, steps), work) if arm in OURS else run_peer(arm, work, steps)
    )
    rate = found["tokens"] / found["seconds"]
    print("\n" + json.dumps({"tokens_per_s": rate, "peak": peak_bytes()}))


def main() -> None:
    """Runs all arms in turn and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=OURS + PEERS, default=list(OURS + PEERS))
    parser.add_argument("--arm", help="run one arm in this process")
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    if asked.arm:
        run_arm(asked.arm, asked.work, asked.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_work(work, asked.shape)
        write_encoded(work)
        found = take_turns("benchmarks.qlora_step", asked.arms, work, asked)
    table = to_table(asked, found)
    print(table)
    write_text(RESULTS / f"qlora_step_{asked.shape}.md", table)


def to_table(asked: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> str:
    """Medians, and how our QLoRA stands to each arm."""
    speed = {a: statistics.median(r["tokens_per_s"] for r in runs) for a, runs in found.items()}
    peak = {a: statistics.median(r["peak"] for r in runs) for a, runs in found.items()}
    lines = [
        f"# A QLoRA step at the {asked.shape} shape, CPU", "",
        "| arm | tokens/s (range) | peak GiB | qlora's speed over it | qlora's peak over it |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for arm, runs in found.items():
        low, high = (f(r["tokens_per_s"] for r in runs) for f in (min, max))
        over = ("-", "-")
        if "qlora" in speed:
            over = (
                f"{speed['qlora'] / speed[arm]:.2f}x",
                f"1/{peak[arm] / peak['qlora']:.2f}",
            )
        lines.append(
            f"| {arm} | {speed[arm]:.1f} ({low:.1f} to {high:.1f}) | {peak[arm] / 2**30:.2f} | "
            f"{over[0]} | {over[1]} |"
        )
    lines += [
        "",
        f"Medians of {asked.repeats} interleaved runs of {asked.steps} steps (the first "
        "is not timed), each a process of its own. Goals: at least 1.0x lora's tokens/s, "
        "and at most 1/8 of peer's peak. Made by `python -m benchmarks.qlora_step`.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
