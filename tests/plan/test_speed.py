"""Predicted speed: work a token, the rate of this machine, and cards by their names."""

import numpy as np
import pytest

from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.plan.hardware import Gpu, Hardware
from lorakeet.plan.memory import KINDS, MemoryCase, count_kept
from lorakeet.plan.model_facts import read_model_facts
from lorakeet.plan.speed import (
    COPIED_FRACTION,
    FULL_TIMES,
    KEPT_TOUCHES,
    LAUNCH_S_PER_LAYER,
    LOGIT_TOUCHES,
    REACHED_FRACTION,
    REACHED_FRACTION_GPU,
    TFLOPS_BF16,
    UPDATE_BYTES,
    Rates,
    estimate_tokens_per_s,
    find_gpu_flops_per_s,
    find_rates,
    measure_copy_rate,
    measure_matmul_rate,
)
from lorakeet.plan.trained import count_trained
from tests.plan.configs import write_config

TINY = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 10}
LAYER = 12 * 8 * 8
MULTIPLIED = LAYER + 10 * 8  # the layer and the tied head
S, T, STEP = 16, 32, 64  # tokens of a row, a micro-batch and a step
ATTENTION = 14 * S * 8
NEVER = 1e30  # a rate that leaves no time


@pytest.fixture
def seconds(tmp_path):
    """Predicted seconds a token of the tiny model, and its case."""
    write_config(tmp_path, TINY)
    facts = read_model_facts(tmp_path)

    def predict(kind, rates, *, is_gpu=False, tokens=T, **more):
        counted = count_trained(facts, MethodSettings(rank=2), is_classifier=False)
        case = MemoryCase(counted=counted, micro_batch_tokens=tokens, is_gpu=is_gpu, **more)
        return (
            facts,
            case,
            1 / estimate_tokens_per_s(facts, kind, rates, case, row_tokens=S, step_tokens=STEP),
        )

    return predict


def test_a_token_costs_four_flop_a_weight_and_six_in_full_training(seconds):
    rates = Rates(flops=1e3, copied_bytes=NEVER)
    facts, case, lora = seconds("lora", rates)
    adapter = 12 * case.counted.adapter_parameters
    work = {"lora": 4 * MULTIPLIED + adapter + ATTENTION, "full": 6 * MULTIPLIED + ATTENTION}
    launch = LAUNCH_S_PER_LAYER[False] / T
    assert lora == pytest.approx(work["lora"] / (REACHED_FRACTION * 1e3) + launch)
    full = seconds("full", rates)[2]
    assert full == pytest.approx(work["full"] / (REACHED_FRACTION * 1e3) + launch)


def test_what_is_kept_is_touched_and_weights_are_read_once_a_micro_batch(seconds):
    rates = Rates(flops=NEVER, copied_bytes=1e6)
    launch = LAUNCH_S_PER_LAYER[False] / T
    nf4 = QuantizationSettings(kind="nf4")
    found = {kind: seconds(kind, rates, quantization=nf4) for kind in KINDS}
    few = {"lora": 0, "full": 0, "lora-8bit": 2 * 5 * LAYER + 8 * (24 + 8 + 32 + 8),
           "qlora": 2 * int((0.5 + 1 / 64 + 4 / 256 / 64) * LAYER) + 8 * LAYER}  # fmt: skip
    for kind, (facts, case, found_s) in found.items():
        numbers = KEPT_TOUCHES * count_kept(facts, kind, case) + LOGIT_TOUCHES * 10
        reads, trained = (3, facts.parameters) if kind == "full" else (2, case.counted.total)
        moved = (
            4 * numbers + (4 * reads * MULTIPLIED + few[kind]) / T + UPDATE_BYTES * trained / STEP
        )
        moved *= FULL_TIMES if kind == "full" else 1
        assert found_s == pytest.approx(moved / (COPIED_FRACTION * 1e6) + launch)


def test_a_gpu_reaches_its_own_share_and_waits_for_kernels_to_start(seconds):
    for tokens in (1, 2048):
        _, case, found = seconds("lora", Rates(flops=1e12), is_gpu=True, tokens=tokens)
        work = 4 * MULTIPLIED + 12 * case.counted.adapter_parameters + ATTENTION
        compute_s = work / (REACHED_FRACTION_GPU * 1e12)
        assert found == pytest.approx(compute_s + LAUNCH_S_PER_LAYER[True] / tokens)


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10", 125),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA RTX 6000 Ada Generation", 364),
])  # fmt: skip
def test_cards_are_found_by_the_names_that_drivers_tell(name, tflops):
    assert find_gpu_flops_per_s(name) == tflops * 1e12


@pytest.mark.parametrize("name", [
    "NVIDIA A10G", "NVIDIA GeForce RTX 3080 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4", "",
])  # fmt: skip
def test_other_cards_are_not_guessed(name):
    assert find_gpu_flops_per_s(name) is None


def test_every_card_of_the_table_is_found_by_its_own_name():
    found = {name: find_gpu_flops_per_s(f"NVIDIA {name}") for name in TFLOPS_BF16}
    assert found == {name: rate * 1e12 for name, rate in TFLOPS_BF16.items()}


def test_the_rates_are_the_cards_where_there_is_one_and_measured_otherwise():
    machine = Hardware(cores=1, memory_bytes=1, free_memory_bytes=1, disk_free_bytes=1)
    found = find_rates(machine)
    assert found.flops > 1e6 and found.copied_bytes > 1e6
    known = Hardware(**{**vars(machine), "gpus": (Gpu(name="NVIDIA H200", memory_bytes=1),)})
    strange = Hardware(**{**vars(machine), "gpus": (Gpu(name="Other", memory_bytes=1),)})
    assert find_rates(known) == Rates(flops=989e12)
    assert find_rates(strange) is None


def test_the_measured_rates_are_finite_numbers():
    for measure in (measure_matmul_rate, measure_copy_rate):
        assert np.isfinite(measure(0.01))
        assert 1e6 < measure(0.01) < 1e15
