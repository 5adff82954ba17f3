"""The Triton kernels of training against float64: interpreted without a GPU, compiled to PTX."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; GPU builds of torch bring it"
)
CHECKS = (
    "norms_equal_the_reference", "norms_take_a_wider_weight", "gates_equal_the_reference",
    "rotations_equal_the_reference", "losses_equal_the_reference", "losses_stand_extreme_logits",
    "heads_score_the_same", "models_train_the_same",
    "units_of_16_bits_are_proved",
)  # fmt: skip


def run(arguments, **more):
    """The last line that a process of its own prints."""
    environment = {**os.environ, **more}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def errors():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    return json.loads(run(["-m", "tests.models.gpu_checks"], **interpreted))


@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_agree_with_their_references(check, errors):
    assert check not in errors, errors[check]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorakeet.models import head_gpu, units_gpu

WIDE = {"r": "*fp32", "dw": "*fp32", "losses": "*fp32", "targets": "*i64", "eps": "fp32",
        "soft_cap": "fp32"}
CASES = [
    (units_gpu.norm_kernel, "x w y", dict(block=4096)),
    (units_gpu.norm_backward_kernel, "x w dy dx", dict(block=4096, wants_dw=True)),
    (units_gpu.gate_kernel, "g u y", dict(act="gelu", size=1024)),
    (units_gpu.gate_backward_kernel, "g u dy dg du", dict(act="silu", size=1024)),
    (units_gpu.gate_backward_kernel, "g u dy dg du", dict(act="gelu-tanh", size=1024)),
    (units_gpu.rotate_kernel, "x cos sin y", dict(sign=-1.0, rows=16, block=64)),
    (head_gpu.cross_entropy_kernel, "logits", dict(is_capped=True, wants_gradient=True,
                                                   block=4096)),
]
sizes = []
for kernel, halves, fixed in CASES:
    types = {n: "*bf16" if n in halves.split() else WIDE.get(n, "i32") for n in kernel.arg_names}
    types |= {n: "constexpr" for n in fixed}
    source = ASTSource(kernel, types, fixed)
    made = triton.compile(source, target=GPUTarget("cuda", %d, 32))
    sizes.append(len(made.asm["ptx"]) if ".entry" in made.asm["ptx"] else 0)
print(min(sizes))
"""


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability, tmp_path):
    assert int(run(["-c", COMPILE % capability], TRITON_CACHE_DIR=str(tmp_path))) > 1000
