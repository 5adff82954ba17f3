"""NF4, FP4, double quantisation and INT8 against bitsandbytes 0.50's CPU code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakeet.quant.int8 import dequantize_int8, quantize_int8
from lorakeet.quant.nf4 import BLOCK_SIZES, LEVELS, dequantize_blocks, quantize_blocks
from lorakeet.quant.scales import build_dynamic_levels

functional = pytest.importorskip("bitsandbytes.functional")
MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_equal(weight, kind, block_size):
    codes, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type=kind)
    ours = quantize_blocks(weight, kind=kind, block_size=block_size)
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.scales, state.absmax)
    return codes, state, ours


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_equal(kind, block_size, dtype):
    weight = normal(128, 1024, dtype=dtype)
    weight[0], weight[1, 7] = 0, 0
    check_equal(weight, kind, block_size)


@pytest.mark.parametrize("kind", LEVELS)
def test_expanded_weights_are_equal(kind):
    codes, state, ours = check_equal(normal(128, 1024), kind, 64)
    theirs = functional.dequantize_4bit(codes, state)
    assert torch.equal(dequantize_blocks(ours), theirs)


@pytest.mark.slow
def test_codes_and_scales_are_equal_on_10_million_weights():
    check_equal(normal(10_000, 1024, seed=5), "nf4", 64)


def test_codes_and_scales_are_equal_on_real_weights():
    from safetensors import safe_open

    import lorakeet

    starter = Path(lorakeet.__file__).parent / "embedded" / "starter"
    files = [*starter.glob("*.safetensors"), *sorted(MODELS.glob("*/*.safetensors"))]
    seen = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a handle, not a dictionary)
                weight = file.get_tensor(name)
                if weight.dim() == 2 and weight.numel() % 64 == 0:
                    check_equal(weight, "nf4", 64)
                    seen += weight.numel()
    assert seen > 100_000


def test_the_dynamic_levels_are_equal():
    assert torch.equal(build_dynamic_levels(), functional.create_dynamic_map())


@pytest.mark.parametrize("block_size", [64, 256])
def test_double_quantised_scales_differ_at_ties_of_the_coarse_look_up_only(block_size):
    weight = normal(2048, 1024)
    _, state = functional.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=True
    )
    ours = quantize_blocks(weight, block_size=block_size, double=True).scales
    assert ours.offset == state.offset
    assert torch.equal(ours.scales, state.state2.absmax)
    differ = ours.codes != state.absmax
    assert differ.float().mean() < 0.005
    scales = quantize_blocks(weight, block_size=block_size).scales
    spread = ours.scales.repeat_interleave(256)[: len(scales)]
    normed = (scales - ours.offset) / spread
    own, other = ((normed - ours.levels[codes.int()]).abs() for codes in (ours.codes, state.absmax))
    assert (own <= other).all()  # ours is the nearer one
    assert ((other - own)[differ] < 1e-4).all()
    assert ((ours.codes.int() - state.absmax.int()).abs() <= 1).all()


def test_their_double_quantised_weights_expand_to_the_same_numbers():
    from dataclasses import replace

    weight = normal(64, 1024)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    blocks = quantize_blocks(weight, double=True)
    theirs = replace(blocks, scales=replace(blocks.scales, codes=state.absmax))
    assert torch.equal(dequantize_blocks(theirs), functional.dequantize_4bit(codes, state))


def test_int8_codes_and_scales_are_equal():
    weight = normal(256, 512, dtype=torch.bfloat16)
    codes, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight.float().clone())
    ours = quantize_int8(weight)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scales, largest / 127)
    theirs = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, largest)
    torch.testing.assert_close(dequantize_int8(ours, dtype=torch.float32), theirs.float())


def test_scales_of_one_size_expand_alike():
    """Theirs divides 0 by 0 and stores another code; times a scale of 0 it is the same."""
    weight = torch.ones(300, 64)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs = functional.dequantize_4bit(codes, state)
    assert torch.equal(dequantize_blocks(quantize_blocks(weight, double=True)), theirs)
