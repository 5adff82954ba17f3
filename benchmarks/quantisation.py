"""Weights in 4 and 8 bits against bitsandbytes and float32, on the CPU.

    python -m benchmarks.quantisation [--threads 2] [--rounds 15] [--shapes layer 7b]

For each matrix of a decoder layer of Qwen2.5-0.5B, and for the largest of a 7B model: expansion
of NF4 to float32, and products of NF4 and INT8 with 1 to 8 rows.  The arms take turns; in each
turn an arm runs ``WARM`` times for its own caches, then ``TIMED`` times for the clock.  Medians
over the turns.  Ours expands into memory that is reused, as training does; bitsandbytes has no
such choice on the CPU and allocates.  With one thread the clock is that thread's CPU time, so
other programs do not count; with more it is the wall's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as bnb_functional
from torch.nn import functional as F

from lorakeet.base.native_code import find_native_code
from lorakeet.base.run_folder import write_text
from lorakeet.quant.int8 import quantize_int8
from lorakeet.quant.kernels import dequantize_nf4, multiply
from lorakeet.quant.nf4 import dequantize_blocks, quantize_blocks

RESULTS = Path(__file__).parent / "results"
WARM, TIMED = 2, 3
CALM_S = 0.01  # bitsandbytes has threads of its own, which spin for some ms after each call
ROWS = (1, 2, 4, 8)
# (out, in) and how often a layer has it: queries and outputs, keys and values, gate and up, down
SHAPES = {
    "layer": {(896, 896): 2, (128, 896): 2, (4864, 896): 2, (896, 4864): 1},
    "7b": {(4096, 11008): 1},
}
TITLES = {
    "layer": "all linear layers of a decoder layer of Qwen2.5-0.5B",
    "7b": "4096 x 11008",
}

Arm = Callable[[], torch.Tensor]
Times = dict[tuple[str, str], float]


def build_arms(shape: tuple[int, int]) -> dict[tuple[str, str], Arm]:
    """What is timed, by (work, arm); all arms of a work compute the same."""
    num_out, num_in = shape
    W = torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(0))
    blocks, doubled, rows = quantize_blocks(W), quantize_blocks(W, double=True), quantize_int8(W)
    codes, state = bnb_functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    scratch = torch.empty(num_out * num_in)
    assert torch.equal(bnb_functional.dequantize_4bit(codes, state), dequantize_blocks(blocks))
    arms: dict[tuple[str, str], Arm] = {
        ("expand", "bitsandbytes"): lambda: bnb_functional.dequantize_4bit(codes, state),
        ("expand", "nf4"): lambda: dequantize_nf4(blocks, out=scratch),
        ("expand", "nf4 double"): lambda: dequantize_nf4(doubled, out=scratch),
    }
    for count in ROWS:
        x = torch.randn(count, num_in, generator=torch.Generator().manual_seed(count))
        work = f"{count} rows"
        arms[work, "float32"] = lambda x=x: F.linear(x, W)
        arms[work, "bitsandbytes"] = lambda x=x: bnb.matmul_4bit(x, codes.t(), state)
        arms[work, "nf4"] = lambda x=x: multiply(x, blocks)
        arms[work, "nf4 double"] = lambda x=x: multiply(x, doubled)
        arms[work, "int8"] = lambda x=x: multiply(x, rows)
    return arms


def measure(arms: dict[tuple[str, str], Arm], rounds: int, clock: Callable[[], float]) -> Times:
    """Median seconds of a call."""
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            time.sleep(CALM_S)
            for _ in range(WARM):
                arm()
            start = clock()
            for _ in range(TIMED):
                arm()
            taken[name].append((clock() - start) / TIMED)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def table_of(title: str, times: Times) -> list[str]:
    """Milliseconds, and how many times ours is faster."""
    lines = [f"## {title}", "",
             "| work | float32 | bitsandbytes | nf4 (double) | against bitsandbytes | against "
             "float32 | int8 | against float32 |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for work in ("expand", *(f"{count} rows" for count in ROWS)):
        full, peer, ours, doubled, eight = (
            times.get((work, arm))
            for arm in ("float32", "bitsandbytes", "nf4", "nf4 double", "int8")
        )
        cells = [work, told(full), told(peer), f"{told(ours)} ({told(doubled)})",
                 ratio(peer, ours), ratio(full, ours), told(eight), ratio(full, eight)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def told(seconds: float | None) -> str:
    """Milliseconds, or nothing."""
    return "" if seconds is None else f"{1000 * seconds:.3f}"


def ratio(slow: float | None, fast: float | None) -> str:
    """How many times as fast."""
    return "" if slow is None or fast is None else f"{slow / fast:.2f}x"


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    clock = time.thread_time if asked.threads == 1 else time.perf_counter
    lines = [f"# Weights in 4 and 8 bits, {asked.threads} thread(s)", ""]
    for name in asked.shapes:
        total: Times = {}
        for shape, count in SHAPES[name].items():
            times = measure(build_arms(shape), asked.rounds, clock)
            if len(SHAPES[name]) > 1:
                lines += table_of(f"{shape[0]} x {shape[1]}", times)
            for key, seconds in times.items():
                total[key] = total.get(key, 0.0) + count * seconds
        lines += table_of(TITLES[name], total)
    kind = "CPU" if asked.threads == 1 else "wall"
    lines += [f"Milliseconds of {kind} time, medians of {asked.rounds} turns; "
              f"{find_native_code().found}; made by "
              f"`python -m benchmarks.quantisation --threads {asked.threads}`."]  # fmt: skip
    print("\n".join(lines))
    write_text(RESULTS / f"quantisation_{asked.threads}_threads.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
