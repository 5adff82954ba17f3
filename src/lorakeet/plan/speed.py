"""How fast training will be, from the floating-point work and the machine's rates.

    full   6 N FLOP a token   (forward 2 N, backward to input 2 N, to weights 2 N)
    lora   4 N FLOP a token   (the weight gradient falls away), and 6 P for the adapter

N counts linear layers, the experts that a token is sent to, and the output head; P the
adapter, whose thin products reach half of the rate.  Attention adds 14 S Q L for samples of S
tokens, Q the width of all query heads and L layers: 4 forward, 10 backward.  On a CPU

    s/token = FLOP / (1.18 R)  +  bytes / (0.17 C)  +  L x 22 ms / T

R is the rate of a matmul of 768 x 768 and C that of copying, both measured here in a moment;
larger products run faster than R, and the first layer gives no gradient to its input.  The
bytes are those of the numbers that a layer keeps (``plan.memory``), each touched 6 times on
its way there and back; of the logits, touched 11 times; of the weights, read twice a
micro-batch of T tokens (3 times where they are trained) and expanded twice where they are in
few bits; and of AdamW's update; all of it half as much again in full training.  The last term
is what starting the work of a layer takes.  The shares are measured; ``benchmarks.plan_accuracy``
shows how near they come, recipe by recipe.

On a GPU R is the data sheet's dense bfloat16 rate, where the card's name is known; a share of
it is reached, and kernels take time to start:

    s/token = FLOP / (0.3 R)  +  L x 1 ms / T
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lorakeet.plan.few_bits import count_quantized
from lorakeet.plan.hardware import Hardware
from lorakeet.plan.memory import IN_FEW_BITS, MemoryCase, count_kept
from lorakeet.plan.model_facts import ModelFacts

REACHED_FRACTION = 1.18  # of the measured matmul's rate, on CPUs
COPIED_FRACTION = 0.167  # of the copy's rate on each core, reached by what is no matmul
MAX_COPYING_CORES = 4  # more of them wait for the memory
KEPT_TOUCHES, LOGIT_TOUCHES = 6, 11
FULL_TIMES = 1.5  # what full training moves, over what is counted
UPDATE_BYTES = 28  # a trained weight: w, g, m and v read, w, m and v written
REACHED_FRACTION_GPU = 0.3  # assumed, as no GPU is measured here
LAUNCH_S_PER_LAYER = {False: 22e-3, True: 1e-3}  # on a GPU assumed: 150 kernels, 7 us each
_SIZE, _COPIED = 768, 8 * 2**20  # of the measured matmul, and float32 numbers of the copy
# NVIDIA's data sheets, dense bfloat16 (half of the rate "with sparsity"), in TFLOP/s;
# float32 accumulation on GeForce cards; the longest name that is found counts
TFLOPS_BF16 = {
    "B200": 2250, "GH200": 989, "H200": 989, "H200 NVL": 835, "H100": 989, "H100 PCIe": 756,
    "H100 NVL": 835, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "A40": 150, "A30": 165,
    "A10": 125, "L4": 121, "L40": 181, "L40S": 362, "RTX A6000": 155, "RTX 6000 Ada": 364,
    "RTX 3080": 59.5, "RTX 3090": 71, "RTX 4080": 97.5, "RTX 4090": 165, "RTX 5090": 209.5,
}  # fmt: skip
_OTHERS = "Ti|SUPER|Laptop|Mobile|D"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second.

    Args:
        flops: of a large matmul, or of the card by its data sheet.
        copied_bytes: read and written by a copy on all cores; None on a GPU.
    """

    flops: float
    copied_bytes: float | None = None


def find_rates(machine: Hardware) -> Rates | None:
    """The rates of the device that training runs on; None for a GPU that is not in the table."""
    if machine.gpus:
        flops = find_gpu_flops_per_s(machine.name)
        return Rates(flops=flops) if flops else None
    cores = min(machine.cores, MAX_COPYING_CORES)
    return Rates(flops=measure_matmul_rate(), copied_bytes=cores * measure_copy_rate())


def find_gpu_flops_per_s(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a card by the name that its driver tells.

    A slice of a card (MIG) or a variant of it (Ti, SUPER, Laptop) is another card.

    >>> find_gpu_flops_per_s("NVIDIA H100 80GB HBM3"), find_gpu_flops_per_s("NVIDIA A10G")
    (989000000000000.0, None)
    """
    if re.search(r"\bMIG\b", name):
        return None
    found = [key for key in TFLOPS_BF16 if re.search(rf"\b{key}\b(?! ({_OTHERS})\b)", name)]
    return TFLOPS_BF16[max(found, key=len)] * 1e12 if found else None


def measure_matmul_rate(duration_s: float = 0.12) -> float:
    """FLOP/s of a float32 matmul of 768 x 768, the best of a few."""
    a = np.ones((_SIZE, _SIZE), dtype=np.float32)
    return 2 * _SIZE**3 / _best_time(lambda: a @ a, duration_s)


def measure_copy_rate(duration_s: float = 0.06) -> float:
    """Bytes read and written in a second by a copy of 32 MiB on one core, the best of a few."""
    a, b = np.ones(_COPIED, dtype=np.float32), np.ones(_COPIED, dtype=np.float32)
    return 2 * a.nbytes / _best_time(lambda: np.copyto(b, a), duration_s)


def _best_time(work: Callable[[], object], duration_s: float) -> float:
    best_s, until = float("inf"), time.perf_counter() + duration_s
    while time.perf_counter() < until:
        started = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - started)
    return best_s


def estimate_tokens_per_s(
    facts: ModelFacts, kind: str, rates: Rates, case: MemoryCase, *,
    row_tokens: float, step_tokens: float,
) -> float:  # fmt: skip
    """Predicted training speed in tokens a second.

    Args:
        case: with T and what is trained.
        row_tokens: S, of the sample that a token stands in, on average over tokens.
        step_tokens: that pass the model in an optimiser step.
    """
    flops = count_flops(facts, kind, case, row_tokens)
    launch_s = facts.layers * LAUNCH_S_PER_LAYER[case.is_gpu] / case.micro_batch_tokens
    if case.is_gpu or rates.copied_bytes is None:
        if case.is_gpu and kind == "full":
            flops *= 2  # float32 weights in TF32, half of the rate
        return 1 / (flops / (REACHED_FRACTION_GPU * rates.flops) + launch_s)
    moved_s = count_moved_bytes(facts, kind, case, step_tokens) / (
        COPIED_FRACTION * rates.copied_bytes
    )
    return 1 / (flops / (REACHED_FRACTION * rates.flops) + moved_s + launch_s)


def count_flops(facts: ModelFacts, kind: str, case: MemoryCase, row_tokens: float) -> float:
    """FLOP a token."""
    attention = 14 * row_tokens * facts.query_width * facts.layers
    again = 2 * facts.multiplied * case.recomputes  # layers pass forward a second time
    if kind == "full":
        return 6 * facts.multiplied + attention + again
    return 4 * facts.multiplied + again + 2 * 6 * case.counted.adapter_parameters + attention


def count_moved_bytes(facts: ModelFacts, kind: str, case: MemoryCase, step_tokens: float) -> float:
    """Bytes that a token moves outside of matmuls."""
    numbers = KEPT_TOUCHES * count_kept(facts, kind, case) + LOGIT_TOUCHES * facts.vocabulary
    trained = facts.parameters if kind == "full" else case.counted.total
    weights = 4 * facts.multiplied * (3 if kind == "full" else 2)
    if kind in IN_FEW_BITS:
        held = count_quantized(facts, case.quantization, kind)
        weights += 2 * (held.num_bytes + 4 * held.parameters)
    if kind != "full" and case.form == "dora":
        weights += 12 * facts.linear_parameters  # the norms of W0 + s B A, once a micro-batch
    update = UPDATE_BYTES * trained / step_tokens
    moved = 4 * numbers + weights / case.micro_batch_tokens + update
    return moved * FULL_TIMES if kind == "full" else moved
