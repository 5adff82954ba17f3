"""How fast training will be, from the floating-point work and this machine's rate.

    full   6 N FLOP a token   (forward 2 N, backward to input 2 N, to weights 2 N)
    lora   4 N FLOP a token   (the weight gradient falls away)

N counts linear layers and the output head.  The rate is that of a large matmul,
measured here in a moment; a share of it is reached in training.
"""

from __future__ import annotations

import time

import numpy as np

from lorakeet.plan.model_facts import ModelFacts

REACHED_FRACTION = 0.4  # of the large matmul's rate, on CPUs with transformers' own modules
_SIZE = 768
_FLOPS_PER_TOKEN = {"full": 6, "lora": 4, "lora-8bit": 4, "qlora": 4}


def measure_matmul_rate(duration_s: float = 0.12) -> float:
    """FLOP/s of a float32 matmul of 768 x 768, the best of a few."""
    a = np.ones((_SIZE, _SIZE), dtype=np.float32)
    best_s, until = float("inf"), time.perf_counter() + duration_s
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ a
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * _SIZE**3 / best_s


def estimate_tokens_per_s(facts: ModelFacts, kind: str, flops_per_s: float) -> float:
    """Predicted training speed in tokens a second."""
    work = _FLOPS_PER_TOKEN[kind] * facts.multiplied
    return REACHED_FRACTION * flops_per_s / max(work, 1)
