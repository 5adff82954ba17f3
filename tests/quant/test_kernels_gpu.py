"""The Triton kernels against their references: interpreted without a GPU, and compiled to PTX."""

from __future__ import annotations

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
CHECKS = ("expansion_equals_the_reference", "nf4_products_equal_the_reference",
          "int8_products_equal_the_reference")  # fmt: skip


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
    return json.loads(run(["-m", "tests.quant.gpu_checks"], **interpreted))


@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_agree_with_their_references(check, errors):
    assert check not in errors, errors[check]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorakeet.quant import kernels_gpu as gpu

TYPES = {"x": "*bf16", "y": "*bf16", "out": "*bf16", "scales": "*fp32", "levels": "*fp32"}
FIXED = {"block_bits": 6, "size": gpu.EXPANDED_BYTES, "rows": gpu.ROWS, "outs": gpu.OUTS,
         "columns": gpu.COLUMNS}
sizes = []
for kernel, codes in ((gpu.expand_kernel, "*u8"), (gpu.nf4_kernel, "*u8"),
                      (gpu.int8_kernel, "*i8")):
    names = kernel.arg_names
    types = {n: codes if n == "codes" else TYPES.get(n, "i32") for n in names if n not in FIXED}
    source = ASTSource(kernel, {**types, **{n: "constexpr" for n in names if n in FIXED}},
                       {n: FIXED[n] for n in names if n in FIXED})
    made = triton.compile(source, target=GPUTarget("cuda", %d, 32))
    sizes.append(len(made.asm["ptx"]) if ".entry" in made.asm["ptx"] else 0)
print(min(sizes))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability, tmp_path):
    assert int(run(["-c", COMPILE % capability], TRITON_CACHE_DIR=str(tmp_path))) > 1000
