"""How fast training will be, from the floating-point work and the machine's rate.

    full   6 N FLOP a token   (forward 2 N, backward to input 2 N, to weights 2 N)
    lora   4 N FLOP a token   (the weight gradient falls away)

N counts linear layers, the experts that a token is sent to, and the output head.  On a
CPU the rate is that of a large matmul, measured here in a moment; on a GPU it is the
data sheet's dense bfloat16 rate, where the card's name is known.  A share of the rate is
reached in training; attention, norms and waiting for memory take the rest.  On a GPU a
micro-batch of T tokens takes L layers x 1 ms besides, in which kernels are started, so

    tokens/s = 1 / (work / (share x rate) + L x 1 ms / T)
"""

from __future__ import annotations

import re
import time

import numpy as np

from lorakeet.plan.hardware import Hardware
from lorakeet.plan.model_facts import ModelFacts

REACHED_FRACTION = 0.4  # of the large matmul's rate, on CPUs with transformers' own modules
REACHED_FRACTION_GPU = 0.3  # assumed, as no GPU is measured here
LAUNCH_S_PER_LAYER = 1e-3  # assumed: about 150 kernels forward and backward, 7 microseconds each
_SIZE = 768
_FLOPS_PER_TOKEN = {"full": 6, "lora": 4, "lora-8bit": 4, "qlora": 4}
# NVIDIA's data sheets, dense bfloat16 (half of the rate "with sparsity"), in TFLOP/s;
# float32 accumulation on GeForce cards; the longest name that is found counts
TFLOPS_BF16 = {
    "B200": 2250, "GH200": 989, "H200": 989, "H200 NVL": 835, "H100": 989, "H100 PCIe": 756,
    "H100 NVL": 835, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "A40": 150, "A30": 165,
    "A10": 125, "L4": 121, "L40": 181, "L40S": 362, "RTX A6000": 155, "RTX 6000 Ada": 364,
    "RTX 3080": 59.5, "RTX 3090": 71, "RTX 4080": 97.5, "RTX 4090": 165, "RTX 5090": 209.5,
}  # fmt: skip
_OTHERS = "Ti|SUPER|Laptop|Mobile|D"


def find_flops_per_s(machine: Hardware) -> float | None:
    """FLOP/s of the device that training runs on; None for a GPU that is not in the table."""
    return find_gpu_flops_per_s(machine.name) if machine.gpus else measure_matmul_rate()


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
    best_s, until = float("inf"), time.perf_counter() + duration_s
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ a
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * _SIZE**3 / best_s


def estimate_tokens_per_s(
    facts: ModelFacts, kind: str, flops_per_s: float, *, gpu_micro_batch_tokens: int | None = None
) -> float:
    """Predicted training speed in tokens a second.

    Args:
        flops_per_s: of a large matmul, or of the card by its data sheet.
        gpu_micro_batch_tokens: T on a GPU; None on a CPU, where starting work costs little.
    """
    share = REACHED_FRACTION_GPU if gpu_micro_batch_tokens else REACHED_FRACTION
    token_s = _FLOPS_PER_TOKEN[kind] * facts.multiplied / (share * flops_per_s)
    if gpu_micro_batch_tokens:
        token_s += facts.layers * LAUNCH_S_PER_LAYER / gpu_micro_batch_tokens
    return 1 / token_s
