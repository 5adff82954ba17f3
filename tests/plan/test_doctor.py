"""What the doctor finds: packages, a GPU without a build for it, and room."""

import pytest

from lorakeet.base import gpu_code
from lorakeet.base.native_code import NativeCode
from lorakeet.plan import doctor
from lorakeet.plan.doctor import EXTRAS, check_machine


def look():
    """Findings by name."""
    return {finding.name: finding for finding in check_machine()}


def test_this_machine_is_looked_at_whole():
    found = look()
    assert set(found) == {"python", "torch", "transformers", *EXTRAS, "GPU", "cores",
                          "quantised weights", "free memory", "free disk"}  # fmt: skip
    assert found["python"].is_ok
    assert found["torch"].is_ok and "build" in found["torch"].found
    assert all(finding.found for finding in found.values())


def test_what_is_not_well_has_advice_and_what_is_well_has_none():
    assert all(bool(f.advice) is not f.is_ok for f in check_machine() if f.name != "GPU")


def test_a_missing_extra_says_what_is_lost_and_how_to_add_it(packages):
    packages(tensorboard="2.0")
    found = look()
    assert (found["tensorboard"].is_ok, found["tensorboard"].found) == (True, "2.0")
    assert (found["pyarrow"].is_ok, found["pyarrow"].found) == (False, "absent")
    assert "no Parquet files" in found["pyarrow"].advice
    assert "lorakeet[parquet]" in found["pyarrow"].advice


def test_missing_torch_and_transformers_say_what_brings_them(packages):
    packages()
    found = look()
    assert (found["torch"].is_ok, found["transformers"].is_ok) == (False, False)
    assert "setup_torch.py" in found["torch"].advice
    assert "pip install" in found["transformers"].advice


@pytest.mark.parametrize(("versions", "is_ok"), [
    ({"torch": "2.13.0+cpu"}, False), ({"torch": "2.13.0+cu128"}, True),
    ({"torch": "2.13.0", "nvidia_cuda_runtime_cu12": "12.8"}, True),
])  # fmt: skip
def test_a_gpu_needs_a_build_of_torch_that_can_use_it(driver, packages, versions, is_ok):
    driver("NVIDIA L4, 23034")
    packages(**versions)
    found = look()
    assert found["torch"].is_ok is is_ok
    assert (found["GPU"].found, found["GPU"].advice) == ("NVIDIA L4", "")


@pytest.mark.parametrize("triton", [True, False])
def test_a_gpu_is_told_what_computes_there(driver, monkeypatch, triton):
    driver("NVIDIA L4, 23034")
    for home in (doctor, gpu_code):
        monkeypatch.setattr(home, "has_triton", lambda: triton)
    monkeypatch.setattr(gpu_code, "has_flash_attention", lambda: False)
    found = look()
    kernels, attention = found["GPU kernels"], found["packed attention"]
    assert kernels.is_ok is attention.is_ok is triton
    assert attention.found == ("flex" if triton else "sdpa-per-document")
    assert bool(kernels.advice) is bool(attention.advice) is not triton


def test_too_little_memory_and_disk_are_told_with_what_is_needed(monkeypatch):
    monkeypatch.setattr(doctor, "MIN_MEMORY_BYTES", 2**60)
    monkeypatch.setattr(doctor, "MIN_DISK_BYTES", 2**60)
    found = look()
    for name in ("free memory", "free disk"):
        assert not found[name].is_ok
        assert "less than 1073741824.00 GiB" in found[name].advice


def test_the_path_of_quantised_weights_is_named(monkeypatch):
    found = look()["quantised weights"]
    assert found.found.startswith(("compiled for AVX2", "reference"))
    absent = NativeCode(is_usable=False, found="reference (llvmlite absent)")
    monkeypatch.setattr(doctor, "find_native_code", lambda: absent)
    found = look()["quantised weights"]
    assert (found.is_ok, found.found) == (False, "reference (llvmlite absent)")
    assert "pip install llvmlite" in found.advice
