"""The fast paths against their readable references, on every shape, format and thread count."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from lorakeet.base.errors import ShapeError
from lorakeet.base.native_code import find_native_code
from lorakeet.quant import kernels
from lorakeet.quant.int8 import dequantize_int8, quantize_int8
from lorakeet.quant.kernels import (
    MAX_FUSED_ROWS,
    dequantize_nf4,
    dequantize_rows,
    multiply,
)
from lorakeet.quant.nf4 import BLOCK_SIZES, LEVELS, dequantize_blocks, quantize_blocks

SHAPES = [
    (1, 64),
    (3, 128),
    (7, 64),
    (131, 1088),
    (64, 5184),
]  # odd rows, several chunks and groups
needs_native = pytest.mark.skipif(
    not find_native_code().is_usable, reason=f"kernels are not compiled: {find_native_code().found}"
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(shape, *, block_size=64, kind="nf4", double=False):
    return quantize_blocks(normal(*shape), block_size=block_size, kind=kind, double=double)


def assert_close(found, expected_double):
    """Within 1e-5 of the largest answer, judged in float64."""
    error = (found.double() - expected_double).abs().max()
    assert error <= 1e-5 * expected_double.abs().max()


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Small work is shared by threads too."""
    if find_native_code().is_usable:
        monkeypatch.setattr("lorakeet.quant.compiled.MIN_WORK_OF_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_expanded_weights_equal_the_reference_in_every_bit(block_size, kind, double, threads):
    blocks = blocks_of((48, 2048), block_size=block_size, kind=kind, double=double)
    assert torch.equal(dequantize_nf4(blocks), dequantize_blocks(blocks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 37)])
def test_expanded_rows_of_int8_equal_the_reference_in_every_bit(shape, dtype, threads):
    weight = quantize_int8(normal(*shape).to(dtype))
    scratch = torch.full((shape[0] * shape[1] + 9,), 7.0, dtype=dtype)
    for out in (None, scratch[8:], scratch[1:]):
        found = dequantize_rows(weight, out=out)
        assert found.dtype == dtype and torch.equal(found, dequantize_int8(weight))
    assert scratch[0] == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("double", [False, True])
def test_expansion_into_any_dtype_equals_the_reference(dtype, double, monkeypatch):
    monkeypatch.setattr(kernels, "PIECE", 2**14 if not double else 2**15)
    blocks = blocks_of((40, 1024), double=double)
    blocks = replace(blocks, dtype=dtype)
    found = dequantize_nf4(blocks)
    assert found.dtype == dtype
    assert torch.equal(found, dequantize_blocks(blocks))


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_a_scratch_is_written_at_its_head_alone_whatever_its_alignment(offset):
    blocks = blocks_of((3, 128))
    scratch = torch.full((600,), 7.0)
    found = dequantize_nf4(blocks, out=scratch[offset:])
    assert found.data_ptr() == scratch[offset:].data_ptr()
    assert torch.equal(found, dequantize_blocks(blocks))
    assert (scratch[:offset] == 7).all() and (scratch[offset + 384 :] == 7).all()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, MAX_FUSED_ROWS + 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
def test_nf4_products_equal_the_reference(num_rows, shape, double, threads):
    blocks, x = blocks_of(shape, double=double), normal(num_rows, shape[1], seed=1)
    expected = x.double() @ dequantize_blocks(blocks).double().T
    assert_close(multiply(x, blocks), expected)


@pytest.mark.parametrize("block_size", [64, 512, 4096])
@pytest.mark.parametrize("kind", LEVELS)
def test_blocks_may_span_several_rows(block_size, kind):
    blocks, x = blocks_of((64, 192), block_size=block_size, kind=kind), normal(2, 192)
    assert_close(multiply(x, blocks), x.double() @ dequantize_blocks(blocks).double().T)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, MAX_FUSED_ROWS + 1])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 37)])
def test_int8_products_equal_the_reference(num_rows, shape, threads):
    weight, x = quantize_int8(normal(*shape)), normal(num_rows, shape[1], seed=1)
    assert_close(multiply(x, weight), x.double() @ dequantize_int8(weight).double().T)


def test_rows_that_no_step_divides_take_the_reference():
    blocks, x = blocks_of((64, 37)), normal(2, 37)
    assert_close(multiply(x, blocks), x.double() @ dequantize_blocks(blocks).double().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_dtype_and_layout_keep_their_dtype_and_shape(dtype):
    blocks, weight = blocks_of((5, 64)), quantize_int8(normal(5, 64))
    x = normal(64, 3, 2).to(dtype).permute(2, 1, 0)
    for found, W in (
        (multiply(x, blocks), dequantize_blocks(blocks)),
        (multiply(x, weight), dequantize_int8(weight)),
    ):
        assert found.dtype == dtype and found.shape == (2, 3, 5)
        expected = torch.nn.functional.linear(x.float(), W)
        limit = 2 * torch.finfo(dtype).eps + 1e-5
        assert (found.float() - expected).abs().max() <= limit * expected.abs().max()


@needs_native
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_whatever_the_batch_and_the_threads(shape, threads):
    x = normal(MAX_FUSED_ROWS, shape[1], seed=2)
    blocks, weight = blocks_of(shape, double=True), quantize_int8(normal(*shape))
    for W in (blocks, weight):
        alone = torch.cat([multiply(row[None], W) for row in x])
        for num_rows in (1, 2, 3, 4, 5, 6, 7, 8, 13, MAX_FUSED_ROWS):
            assert torch.equal(multiply(x[:num_rows], W), alone[:num_rows])
            assert torch.equal(multiply(x[-num_rows:], W), alone[-num_rows:])


def test_threads_that_call_at_once_get_the_answers_of_one():
    blocks, weight = blocks_of((130, 1088)), quantize_int8(normal(130, 1088))
    inputs = [normal(1 + i % 8, 1088, seed=i) for i in range(64)]

    def answer(x):
        return multiply(x, blocks), multiply(x, weight)

    expected = [answer(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(answer, inputs), expected, strict=True):
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_nan_in_a_row_stays_in_that_row():
    blocks, x = blocks_of((5, 64)), normal(3, 64)
    x[1, 5] = torch.nan
    found = multiply(x, blocks)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_without_native_code_the_references_answer(monkeypatch):
    blocks, weight, x = blocks_of((6, 128)), quantize_int8(normal(6, 128)), normal(2, 128)
    monkeypatch.setattr(kernels, "_is_native", lambda: False)
    monkeypatch.setattr(kernels, "_load_kernel", None)
    assert torch.equal(dequantize_nf4(blocks), dequantize_blocks(blocks))
    assert torch.equal(dequantize_rows(weight), dequantize_int8(weight))
    assert_close(multiply(x, blocks), x.double() @ dequantize_blocks(blocks).double().T)
    assert_close(multiply(x, weight), x.double() @ dequantize_int8(weight).double().T)


def test_no_rows_give_no_rows():
    assert multiply(torch.empty(0, 64), blocks_of((5, 64))).shape == (0, 5)
    assert multiply(torch.empty(2, 0, 64), quantize_int8(normal(5, 64))).shape == (2, 0, 5)


def test_sizes_that_do_not_fit_are_told():
    with pytest.raises(ShapeError, match=r"x is \[2, 65\] and the weight \[5, 64\]"):
        multiply(normal(2, 65), blocks_of((5, 64)))
    with pytest.raises(ShapeError, match=r"x is \[65\] and the weight \[5, 64\]"):
        multiply(normal(65), quantize_int8(normal(5, 64)))
