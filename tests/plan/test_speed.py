"""Predicted speed: work a token, the rate of this machine, and cards by their names."""

import numpy as np
import pytest

from lorakeet.plan.hardware import Gpu, Hardware
from lorakeet.plan.model_facts import read_model_facts
from lorakeet.plan.speed import (
    LAUNCH_S_PER_LAYER,
    REACHED_FRACTION,
    REACHED_FRACTION_GPU,
    TFLOPS_BF16,
    estimate_tokens_per_s,
    find_flops_per_s,
    find_gpu_flops_per_s,
    measure_matmul_rate,
)
from tests.plan.configs import write_config

TINY = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 10}
MULTIPLIED = 12 * 8 * 8 + 10 * 8  # the layer and the tied head


def test_a_token_costs_four_flop_a_weight_and_six_in_full_training(tmp_path):
    write_config(tmp_path, TINY)
    facts = read_model_facts(tmp_path)
    lora = estimate_tokens_per_s(facts, "lora", 1e9)
    assert lora == pytest.approx(REACHED_FRACTION * 1e9 / (4 * MULTIPLIED))
    assert estimate_tokens_per_s(facts, "full", 1e9) == pytest.approx(lora * 4 / 6)


def test_a_gpu_reaches_its_own_share_and_waits_for_kernels_to_start(tmp_path):
    write_config(tmp_path, TINY)
    facts = read_model_facts(tmp_path)
    compute_s = 4 * MULTIPLIED / (REACHED_FRACTION_GPU * 1e12)
    for tokens in (1, 2048):
        found = estimate_tokens_per_s(facts, "lora", 1e12, gpu_micro_batch_tokens=tokens)
        assert 1 / found == pytest.approx(compute_s + LAUNCH_S_PER_LAYER / tokens)


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


def test_the_rate_is_the_cards_where_there_is_one_and_measured_otherwise():
    machine = Hardware(cores=1, memory_bytes=1, free_memory_bytes=1, disk_free_bytes=1)
    assert find_flops_per_s(machine) > 1e6
    known = Hardware(**{**vars(machine), "gpus": (Gpu(name="NVIDIA H200", memory_bytes=1),)})
    strange = Hardware(**{**vars(machine), "gpus": (Gpu(name="Other", memory_bytes=1),)})
    assert (find_flops_per_s(known), find_flops_per_s(strange)) == (989e12, None)


def test_the_measured_rate_is_a_finite_number():
    assert np.isfinite(measure_matmul_rate(0.01))
    assert 1e6 < measure_matmul_rate(0.01) < 1e15
