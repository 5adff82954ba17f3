"""The GPU path on a GPU: each kernel against its reference, then a step against the peers.

    python -m benchmarks.gpu_step [--shape 0.5b] [--steps 20] [--repeats 3] [--checks-only]

Kernels: the largest error against float64 on the same numbers, and the time of kernel and
reference (median of 20, between events of the device) with the bandwidth that the kernel
reaches.  Step: the work of ``benchmarks.training_step`` with 64 rows a step, bf16 base, float32
adapters; Lorakeet through ``lorakeet.train`` with its default recipe, PEFT + Trainer with
random and grouped batches, and TRL packing, all in bf16, each in a process of its own.

Without a CUDA device nothing can be timed and the script says so; TRITON_INTERPRET=1 then runs
the checks alone, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import run_timed, take_turns
from benchmarks.training_step import ARMS, SHAPES, encoded_rows, write_work
from lorakeet.base.gpu_code import has_triton
from lorakeet.base.run_folder import write_text

RESULTS = Path(__file__).parent / "results"
ROWS_PER_STEP, PACK_TOKENS, PREFIX = 64, 4096, 60
TOKENS, WIDTH, FFN, HEADS, VOCABULARY = 4096, 2048, 8192, 16, 151_936
NOTHING = (
    "There is no CUDA device here, so nothing of the GPU path is timed and no result is written. "
    "Run this on a machine with an NVIDIA GPU and a CUDA build of torch. "
)


def list_kernels() -> list[tuple[str, Callable[..., Any], Callable[..., Any], tuple, int]]:
    """Name, kernel, reference, inputs, and bytes that must be moved."""
    from lorakeet.models import head_gpu, score, units_gpu

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, w = draw(TOKENS, WIDTH), draw(WIDTH)
    g, u = draw(TOKENS, FFN), draw(TOKENS, FFN)
    q = draw(1, TOKENS, HEADS, WIDTH // HEADS).transpose(1, 2)
    angles = torch.rand(1, 1, TOKENS, WIDTH // HEADS, device="cuda")
    logits = draw(441, VOCABULARY)
    targets = torch.randint(VOCABULARY, (441,), device="cuda")

    def plain_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), w, 1e-6)

    def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def lose(cross_entropy: Callable[..., Any], logits: Any, targets: Any) -> torch.Tensor:
        return cross_entropy(logits.clone(), targets, None, wants_gradient=True)[1]

    return [
        ("RMS norm", lambda x, w: units_gpu.norm(x, w, 1e-6)[0], plain_norm, (x, w),
         2 * x.nbytes),
        ("SwiGLU gate", lambda g, u: units_gpu.gate(g, u, "silu"),
         lambda g, u: torch.nn.functional.silu(g) * u, (g, u), 3 * g.nbytes),
        ("rotation", units_gpu.rotate, plain_rotate, (q, angles.cos(), angles.sin()),
         2 * q.nbytes),
        ("loss head (with a copy)", lambda z, t: lose(head_gpu.cross_entropy, z, t),
         lambda z, t: lose(score.cross_entropy, z, t), (logits, targets), 5 * logits.nbytes),
    ]  # fmt: skip


def measure_kernels() -> list[str]:
    """A row a kernel: largest error, times, ratio and bandwidth."""
    rows = ["| kernel | largest error, of the largest number | kernel | reference | ratio | GB/s |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for name, kernel, reference, inputs, num_bytes in list_kernels():
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        if "loss" in name:  # float64 of these logits would take 500 MB
            wide = [x.float() if x.is_floating_point() else x for x in inputs]
        expected, found = reference(*wide).double(), kernel(*inputs).double()
        error = float((found - expected).abs().max() / expected.abs().max())
        ours, theirs = (time_ms(partial(f, *inputs)) for f in (kernel, reference))
        rows.append(
            f"| {name} | {error:.1e} | {ours:.3f} ms | {theirs:.3f} ms | {theirs / ours:.2f}x | "
            f"{num_bytes / ours / 1e6:.0f} |"
        )
    return rows


def time_ms(call: Callable[[], Any]) -> float:
    """Median of 20 calls after 5, in milliseconds of the device."""
    for _ in range(5):
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(20)]
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def check_kernels() -> dict[str, str]:
    """The errors of the same checks that the tests make; empty when all agree."""
    from tests.models.gpu_checks import run_checks

    return run_checks()


def run_lorakeet(work: Path, steps: int) -> dict[str, float]:
    """Our arm, as a user would run it."""
    import lorakeet as lk
    from lorakeet.base.events import read_events

    folder = work / f"run-{time.time_ns()}"
    recipe = {
        "base": str(work / "base"),
        "data": {"train": str(work / "rows.jsonl"), "validation": 0, "deduplicate": False},
        "train": {"batch_size": ROWS_PER_STEP, "max_steps": steps, "epochs": 1000},
    }
    lk.train(recipe, folder)
    events = list(read_events(folder / "events.jsonl"))
    path = next(e for e in events if e["kind"] == "path")
    print(json.dumps({k: path[k] for k in ("kernels", "attention", "units")}), file=sys.stderr)
    done = [e for e in events if e["kind"] == "step"][3:]  # the first ones compile
    return {"tokens": sum(e["num_tokens"] for e in done),
            "seconds": sum(e["duration_s"] for e in done)}  # fmt: skip


def run_peer(arm: str, work: Path, steps: int) -> dict[str, float]:
    """PEFT with Trainer or TRL in bf16 on the same rows."""
    import peft
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    rows = Dataset.from_list(encoded_rows(work))
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    is_packed = arm == "trl-packing"
    attention = "flash_attention_2" if is_packed and _has("flash_attn") else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        work / "base", dtype=torch.bfloat16, attn_implementation=attention
    )
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {
        "output_dir": str(work / arm), "max_steps": steps, "learning_rate": 2e-4, "bf16": True,
        "report_to": [], "save_strategy": "no", "logging_strategy": "no", "seed": 0,
        "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    if is_packed:
        from trl import SFTConfig, SFTTrainer

        settings = SFTConfig(
            packing=True, max_length=PACK_TOKENS, per_device_train_batch_size=4, **options
        )
        trainer = SFTTrainer(model=model, args=settings, train_dataset=rows,
                             processing_class=tokenizer, peft_config=lora)  # fmt: skip
    else:
        if arm == "trainer-grouped":
            options["train_sampling_strategy"] = "group_by_length"
        settings = TrainingArguments(per_device_train_batch_size=ROWS_PER_STEP, **options)
        trainer = Trainer(
            model=peft.get_peft_model(model, lora),
            args=settings,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
    return run_timed(trainer, warm_steps=3, wait=torch.cuda.synchronize)


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def run_arm(arm: str, work: Path, steps: int) -> None:
    """One arm in this process; its figures as one line of JSON."""
    found = run_lorakeet(work, steps) if arm == "lorakeet" else run_peer(arm, work, steps)
    peak = torch.cuda.max_memory_allocated()
    print("\n" + json.dumps({"tokens_per_s": found["tokens"] / found["seconds"], "peak": peak}))


def measure_step(asked: argparse.Namespace) -> list[str]:
    """Interleaved runs of all arms, as the rows of a table."""
    work = Path(tempfile.mkdtemp())
    try:
        write_work(work, asked.shape, None, PREFIX, asked.steps)
        found = take_turns("benchmarks.gpu_step", list(ARMS), work, asked)
    finally:
        shutil.rmtree(work)
    speed = {a: statistics.median(r["tokens_per_s"] for r in runs) for a, runs in found.items()}
    rows = ["| | tokens/s (range) | lorakeet is faster by | peak GiB |", "|---|---|---|---|"]
    for arm, runs in found.items():
        low, high = (f(r["tokens_per_s"] for r in runs) for f in (min, max))
        peak = statistics.median(r["peak"] for r in runs) / 2**30
        rows.append(f"| {arm} | {speed[arm]:.0f} ({low:.0f} to {high:.0f}) | "
                    f"{speed['lorakeet'] / speed[arm]:.2f}x | {peak:.2f} |")  # fmt: skip
    return rows


def main() -> None:
    """Checks, times and writes the table; without a GPU it says what it cannot do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--arm", help="run one arm in this process")
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    if asked.arm:
        run_arm(asked.arm, asked.work, asked.steps)
        return
    has_gpu = torch.cuda.is_available()
    if not has_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit(NOTHING + "TRITON_INTERPRET=1 runs the kernels' checks on this CPU.")
    if not has_triton():
        raise SystemExit("Triton is not installed, so there is no kernel to check.")
    errors = check_kernels()
    for name, error in errors.items():
        print(f"{name} FAILS\n{error}")
    if errors:
        raise SystemExit(f"{len(errors)} checks fail; nothing is timed.")
    print("All kernels agree with their references.")
    if not has_gpu:
        raise SystemExit("They ran in Triton's interpreter. " + NOTHING)
    if asked.checks_only:
        return
    device = torch.cuda.get_device_name()
    work = f"{SHAPES[asked.shape][0]}'s shape, {ROWS_PER_STEP} rows a step, prefix {PREFIX}, bf16:"
    end = (
        f"torch {torch.__version__}; medians of {asked.repeats} interleaved runs of {asked.steps} "
        "steps without the first 3; made by `python -m benchmarks.gpu_step`."
    )
    table = [f"# The GPU path on {device}", "", *measure_kernels(), "", work, "",
             *measure_step(asked), "", end]  # fmt: skip
    print("\n".join(table))
    name = re.sub(r"\W+", "_", device.lower()).strip("_")
    write_text(RESULTS / f"gpu_step_{name}.md", "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
