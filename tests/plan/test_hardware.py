"""The machine in numbers; GPUs as a driver's tool on the PATH tells them."""

import os

import psutil
import pytest

from lorakeet.base.units import GIB, MIB
from lorakeet.plan.hardware import Gpu, Hardware, read_gpus, read_hardware, read_training_hardware


def test_no_driver_means_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_gpus() == ()


def test_cards_are_read_with_their_memory(driver):
    driver("NVIDIA H100 80GB HBM3, 81559\nNVIDIA L4, 23034")
    assert read_gpus() == (
        Gpu(name="NVIDIA H100 80GB HBM3", memory_bytes=81559 * MIB),
        Gpu(name="NVIDIA L4", memory_bytes=23034 * MIB),
    )


@pytest.mark.parametrize(("output", "code"), [
    ("NVIDIA-SMI has failed because it couldn't communicate with the driver.", 9),
    ("No devices were found", 0), ("NVIDIA A100, [N/A]", 0), ("", 0),
])  # fmt: skip
def test_a_driver_that_fails_or_tells_nothing_means_no_gpu(driver, output, code):
    driver(output, code)
    assert read_gpus() == ()


def test_this_machine_is_read_as_the_system_tells_it(tmp_path):
    machine = read_hardware(tmp_path)
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.memory_bytes == psutil.virtual_memory().total
    assert 0 < machine.free_memory_bytes <= machine.memory_bytes
    assert machine.disk_free_bytes > 0


def test_training_uses_the_largest_card_or_free_main_memory():
    plain = Hardware(cores=4, memory_bytes=8 * GIB, free_memory_bytes=5 * GIB, disk_free_bytes=1)
    assert (plain.usable_bytes, plain.name) == (5 * GIB, "CPU, 4 cores")
    cards = (Gpu(name="small", memory_bytes=GIB), Gpu(name="large", memory_bytes=9 * GIB))
    with_cards = Hardware(**{**vars(plain), "gpus": cards})
    assert (with_cards.usable_bytes, with_cards.name) == (9 * GIB, "large")


@pytest.mark.parametrize(("visible", "names"), [
    ("", []), ("-1", []), ("1", ["NVIDIA L4"]), ("1,0", ["NVIDIA L4", "NVIDIA A10"]),
    ("0,7,1", ["NVIDIA A10"]), ("GPU-8f2a", ["NVIDIA A10", "NVIDIA L4"]),
])  # fmt: skip
def test_hidden_cards_do_not_count(driver, monkeypatch, visible, names):
    driver("NVIDIA A10, 23028\nNVIDIA L4, 23034")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in read_gpus()] == names


@pytest.mark.parametrize(("versions", "count"), [
    ({"torch": "2.13.0+cpu"}, 0), ({"torch": "2.13.0"}, 1), ({"torch": "2.13.0+cu128"}, 1), ({}, 1),
])  # fmt: skip
def test_a_torch_for_the_cpu_trains_on_the_cpu(driver, packages, versions, count):
    driver("NVIDIA L4, 23034")
    packages(**versions)
    assert len(read_hardware().gpus) == 1
    assert len(read_training_hardware().gpus) == count
