"""What the GPU kernels must do, run by ``test_kernels_gpu`` in a process of its own.

On a GPU they are compiled; elsewhere Triton's interpreter runs them, and a process must
choose that before it imports Triton.  Prints one line of JSON: the error of each check.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import replace

import torch

from lorakeet.quant import kernels_gpu
from lorakeet.quant.int8 import dequantize_int8, quantize_int8
from lorakeet.quant.nf4 import dequantize_blocks, quantize_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 64), (13, 64), (9, 320)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def expansion_equals_the_reference():
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            for block_size, shape in ((64, (13, 320)), (256, (16, 192)), (4096, (64, 192))):
                weight = normal(*shape)
                blocks = quantize_blocks(weight, block_size=block_size, kind=kind, double=double)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    typed = replace(blocks, dtype=dtype)
                    out = torch.full((weight.numel() + 5,), 7.0, dtype=dtype, device=DEVICE)
                    found = kernels_gpu.expand_nf4(typed, out)
                    expected = dequantize_blocks(typed)
                    if dtype == torch.bfloat16 and DEVICE == "cpu":
                        # Triton 3.9's interpreter cuts to bfloat16, compiled code rounds
                        near = (found.float() - expected.float()).abs() <= expected.abs() / 128
                        assert near.all(), (kind, block_size, dtype)
                    else:
                        assert torch.equal(found, expected), (kind, block_size, dtype)
                    assert (out[-5:] == 7).all(), "wrote past the weight"


def nf4_products_equal_the_reference():
    for shape in SHAPES:
        for double in (False, True):
            blocks = quantize_blocks(normal(*shape), double=double)
            check_products(kernels_gpu.multiply_nf4, blocks, dequantize_blocks(blocks))
    spanning = quantize_blocks(normal(64, 192), block_size=4096, kind="fp4")
    check_products(kernels_gpu.multiply_nf4, spanning, dequantize_blocks(spanning))


def int8_products_equal_the_reference():
    for shape in (*SHAPES, (5, 37)):
        weight = quantize_int8(normal(*shape))
        check_products(kernels_gpu.multiply_int8, weight, dequantize_int8(weight))


def check_products(multiply, weight, W):
    x = normal(kernels_gpu.ROWS, W.shape[1], seed=1)
    alone = torch.cat([multiply(row[None], weight) for row in x])
    for num_rows in (1, 2, 3, 5, kernels_gpu.ROWS):
        found = multiply(x[:num_rows], weight)
        expected = x[:num_rows].double() @ W.double().T
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), (W.shape, num_rows)
        assert torch.equal(found, alone[:num_rows]), "a row depends on the rows beside it"
    half = multiply(x.view(2, 4, -1).bfloat16(), weight)
    assert half.dtype == torch.bfloat16 and half.shape == (2, 4, W.shape[0])
    expected = x.bfloat16().float() @ W.T
    error = (half.float().view(expected.shape) - expected).abs().max()
    assert error <= 0.01 * expected.abs().max()


CHECKS = (
    expansion_equals_the_reference,
    nf4_products_equal_the_reference,
    int8_products_equal_the_reference,
)

if __name__ == "__main__":
    errors = {}
    for check in CHECKS:
        try:
            check()
        except AssertionError:
            errors[check.__name__] = traceback.format_exc(limit=-3)
    print(json.dumps(errors))
