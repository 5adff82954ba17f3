"""Blocks of 4 bits, their scales in 8 bits, and rows of 8 bits: bounds, layouts, bad input."""

from __future__ import annotations

import pytest
import torch

from lorakeet.base.errors import NumericsError, RequestError, ShapeError
from lorakeet.quant.int8 import dequantize_int8, quantize_int8
from lorakeet.quant.nf4 import (
    BLOCK_SIZES,
    LEVELS,
    dequantize_blocks,
    quantize_blocks,
    with_double_scales,
)
from lorakeet.quant.scales import build_dynamic_levels, dequantize_scales, quantize_scales

LARGEST_HALF_GAP = {"nf4": 0.152, "fp4": 0.1667}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_no_weight_moves_further_than_half_the_largest_gap(kind, block_size):
    weight = normal(64, 128)
    blocks = quantize_blocks(weight, kind=kind, block_size=block_size)
    moved = (weight - dequantize_blocks(blocks)).view(-1, block_size).abs()
    limit = LARGEST_HALF_GAP[kind] * blocks.read_scales()[:, None]
    assert (moved <= limit).all()
    assert (moved > 0.9 * limit).any()


@pytest.mark.parametrize("kind", LEVELS)
def test_values_on_the_levels_come_back_exact_in_any_order(kind):
    levels = torch.tensor(LEVELS[kind])
    weight = 2.5 * levels.repeat(4)[torch.randperm(64)]
    weight[0] = 2.5
    assert torch.equal(dequantize_blocks(quantize_blocks(weight, kind=kind)), weight)


def test_the_earlier_weight_lies_in_the_high_four_bits():
    weight = torch.zeros(64)
    weight[0], weight[1] = 1, -1
    blocks = quantize_blocks(weight)
    assert blocks.codes[0] == 15 * 16 + 0
    assert blocks.codes.shape == (32,)
    assert (blocks.codes[1:] == 7 * 16 + 7).all()


def test_the_published_mean_errors_come_out_at_block_64():
    weight = normal(1024, 1024)
    moved = (weight - dequantize_blocks(quantize_blocks(weight))).abs()
    assert float(moved.mean()) == pytest.approx(0.0728, rel=0.01)
    assert float((moved / (weight.abs() + 1e-8)).mean()) == pytest.approx(0.2033, rel=0.01)


def test_double_quantisation_costs_0_516_bytes_a_parameter():
    weight = normal(2048, 1024)
    blocks = quantize_blocks(weight, double=True)
    held = blocks.codes.numel() + blocks.scales.codes.numel() + 4 * blocks.scales.scales.numel()
    assert held / weight.numel() == pytest.approx(0.516, abs=0.0005)
    plain = quantize_blocks(weight)
    assert (plain.codes.numel() + 4 * plain.scales.numel()) / weight.numel() == 0.5625


def test_scales_in_8_bits_stay_within_half_a_gap_of_the_dynamic_levels():
    scales = normal(1000, seed=3).abs()
    quantized = quantize_scales(scales)
    moved = (dequantize_scales(quantized) - scales).abs()
    spread = quantized.scales.repeat_interleave(256)[:1000]
    assert (moved <= 0.0071 * spread).all()
    assert quantized.scales.shape == (4,)


def test_the_dynamic_levels_are_256_and_ascend():
    levels = build_dynamic_levels()
    assert len(levels) == 256
    assert (levels.diff() > 0).all()
    assert {0.0, 1.0} <= set(levels.tolist())


def test_rounding_the_scales_later_gives_the_same_as_at_once():
    weight = normal(64, 64)
    later, at_once = (
        with_double_scales(quantize_blocks(weight)),
        quantize_blocks(weight, double=True),
    )
    assert torch.equal(later.scales.codes, at_once.scales.codes)
    assert with_double_scales(later) is later


def test_equal_scales_and_zeros_give_finite_weights():
    for weight in (torch.zeros(2, 64), torch.ones(2, 64)):
        back = dequantize_blocks(quantize_blocks(weight, double=True))
        assert torch.equal(back, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_expansion_into_a_scratch_is_the_expansion_to_a_new_tensor(dtype):
    weight = normal(48, 64, dtype=dtype)
    scratch = torch.full((5000,), 7, dtype=dtype)
    for quantized, dequantize in (
        (quantize_blocks(weight, double=True), dequantize_blocks),
        (quantize_int8(weight), dequantize_int8),
    ):
        expanded = dequantize(quantized, out=scratch)
        assert expanded.data_ptr() == scratch.data_ptr()
        assert torch.equal(expanded, dequantize(quantized, dtype=dtype))
        assert (scratch[48 * 64 :] == 7).all()


def test_weights_of_many_chunks_expand_like_their_parts():
    weight = normal(2500, 1024)
    whole = dequantize_blocks(quantize_blocks(weight))
    parts = [dequantize_blocks(quantize_blocks(part)) for part in weight.split(500)]
    assert torch.equal(whole, torch.cat(parts))


def test_int8_stays_within_half_a_step_of_its_row():
    weight = normal(64, 96) * torch.logspace(-3, 2, 64)[:, None]
    quantized = quantize_int8(weight)
    moved = (weight - dequantize_int8(quantized)).abs()
    assert (moved <= 0.5001 * quantized.scales[:, None]).all()
    assert quantized.codes.abs().max() == 127
    assert torch.equal(dequantize_int8(quantize_int8(torch.zeros(3, 4))), torch.zeros(3, 4))


def test_bad_weights_are_refused_with_their_reason():
    spoiled = normal(2, 64)
    spoiled[1, 3] = torch.nan
    for quantize in (quantize_blocks, quantize_int8):
        with pytest.raises(NumericsError, match="NaN or infinity"):
            quantize(spoiled)
    with pytest.raises(ShapeError, match="63 elements, which blocks of 64 do not divide"):
        quantize_blocks(torch.ones(63))
    with pytest.raises(ShapeError, match="no matrix"):
        quantize_int8(torch.ones(4))
    with pytest.raises(RequestError, match="block_size is 63; known are 64"):
        quantize_blocks(torch.ones(63), block_size=63)
    with pytest.raises(RequestError, match="known are nf4, fp4"):
        quantize_blocks(torch.ones(64), kind="nf3")
