"""8-bit AdamW: its levels and codes are bitsandbytes', its steps are AdamW's."""

import json

import pytest
import torch

from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.recipe import TrainSettings
from lorakeet.train.adamw8bit import (
    BLOCK_SIZE,
    MIN_8BIT_SIZE,
    PIECE,
    AdamW8bit,
    _read,
    _write,
    build_levels,
    dequantize_blocks,
    quantize_blocks,
)
from lorakeet.train.checkpoint import read_newest_checkpoint
from lorakeet.train.optimizer import build_optimizer
from tests.train.runs import make_job, make_model, make_recipe, run_job


def draw(size, seed=0, is_signed=True):
    """Values over many powers of ten, as moments have them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator)
    values *= 10 ** (torch.rand(size, generator=generator) * 8 - 6)
    return values if is_signed else values.square()


@pytest.mark.parametrize("is_signed", [True, False])
def test_levels_are_those_of_bitsandbytes(is_signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    expected = functional.create_dynamic_map(signed=is_signed)
    assert torch.equal(build_levels(is_signed), expected)


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("size", [4096, 5000, 40_000])
def test_codes_and_scales_are_those_of_bitsandbytes(is_signed, size):
    """Its readable path, which float64 takes, and never a larger error than its fast one.

    The fast one on the CPU (0.50) looks small values up coarsely; half of these codes differ.
    """
    bnb = pytest.importorskip("bitsandbytes")
    values = draw(size, is_signed=is_signed)
    codes, scales = quantize_blocks(values, is_signed=is_signed)
    ask = (build_levels(is_signed), BLOCK_SIZE)
    expected, absmax = torch.ops.bitsandbytes.quantize_blockwise(values.double(), *ask)
    assert torch.equal(scales, absmax)
    assert (codes != expected).float().mean() < 2e-4  # it multiplies by 1 / s, one rounding more
    fast = bnb.functional.quantize_blockwise(values, code=ask[0], blocksize=BLOCK_SIZE)[0]
    error, other = (
        (dequantize_blocks(found, scales, is_signed=is_signed) - values).abs()
        for found in (codes, fast)
    )
    assert (error <= other * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("is_signed", [True, False])
def test_an_error_is_within_the_bound_and_a_block_does_not_spoil_its_neighbour(is_signed):
    values = draw(4 * BLOCK_SIZE + 7, is_signed=is_signed)
    values[:BLOCK_SIZE] *= 1e6
    codes, scales = quantize_blocks(values, is_signed=is_signed)
    back = dequantize_blocks(codes, scales, is_signed=is_signed)
    limit = 0.0071 * scales.repeat_interleave(BLOCK_SIZE)[: len(values)]
    assert ((back - values).abs() <= limit).all()
    alone = quantize_blocks(values[BLOCK_SIZE:].clone(), is_signed=is_signed)
    assert torch.equal(alone[0], codes[BLOCK_SIZE:]) and torch.equal(alone[1], scales[1:])
    zeros = quantize_blocks(torch.zeros(BLOCK_SIZE), is_signed=is_signed)
    assert not dequantize_blocks(*zeros, is_signed=is_signed).any()


def step_many(optimizer_class, steps=40, size=(64, 128), **options):
    """A least-squares problem with scales that differ; returns losses and the weight."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(size, generator=generator)
    scale = 10 ** torch.rand(size[1], generator=generator)
    weight = torch.nn.Parameter(torch.zeros(size))
    optimizer = optimizer_class([weight], lr=0.05, **options)
    losses = []
    for _ in range(steps):
        loss = ((weight - target) * scale).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, weight.detach(), optimizer


def test_a_few_steps_are_those_of_bitsandbytes_and_nearer_to_exact_moments():
    bnb = pytest.importorskip("bitsandbytes")
    mine, weight, _ = step_many(AdamW8bit, 10, weight_decay=0.1)
    theirs, other, _ = step_many(bnb.optim.AdamW8bit, 10, weight_decay=0.1)
    _, exact, _ = step_many(torch.optim.AdamW, 10, weight_decay=0.1)
    assert mine == pytest.approx(theirs, rel=1e-3)
    distance, their_distance = ((w - exact).abs().mean() for w in (weight, other))
    assert distance < their_distance < 0.1 * exact.abs().mean()


def test_the_loss_follows_that_of_adamw():
    mine, _, optimizer = step_many(AdamW8bit)
    expected, _, _ = step_many(torch.optim.AdamW, weight_decay=0.0)
    assert mine[-1] == pytest.approx(expected[-1], rel=0.05) and mine[-1] < 0.1 * mine[0]
    kept = sum(t.numel() * t.element_size() for t in next(iter(optimizer.state.values())).values())
    assert kept / (64 * 128) == pytest.approx(2 + 2 * 4 / BLOCK_SIZE, abs=0.002)


def test_a_small_tensor_is_moved_exactly_as_by_adamw():
    side = int(MIN_8BIT_SIZE**0.5) - 1
    mine, weight, _ = step_many(AdamW8bit, size=(side, side), weight_decay=0.1)
    expected, other, _ = step_many(torch.optim.AdamW, size=(side, side), weight_decay=0.1)
    assert torch.allclose(weight, other, rtol=1e-5, atol=1e-7)


def test_a_second_moment_above_zero_never_becomes_zero():
    weight = torch.nn.Parameter(torch.zeros(MIN_8BIT_SIZE))
    optimizer = AdamW8bit([weight], lr=1e-3)
    weight.grad = torch.full_like(weight, 1e-6)
    weight.grad[::BLOCK_SIZE] = 10.0
    optimizer.step()
    state = optimizer.state[weight]
    assert (state["exp_avg_sq_codes"] > 0).all()
    before = weight.detach().clone()
    optimizer.step()
    assert (weight - before).abs().max() <= 1.5e-3


def test_a_tensor_larger_than_a_piece_is_moved_as_a_whole():
    size = PIECE + 1000
    weights = [torch.nn.Parameter(torch.zeros(size)) for _ in range(2)]
    gradient = draw(size)
    adamw = torch.optim.AdamW([weights[1]], lr=1e-3, weight_decay=0.0)
    optimizers = [AdamW8bit([weights[0]], lr=1e-3), adamw]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(weights[0], weights[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["adamw-8bit", "adamw-paged", "adamw-8bit-paged"])
def test_the_recipe_chooses_it_and_a_resumed_run_is_bit_identical(name, tmp_path):
    recipe = make_recipe(max_steps=6, optimizer=name, learning_rate=1e-3)
    named = list(make_model().named_parameters())
    built = build_optimizer(named, recipe.train, recipe.method)
    assert isinstance(built, AdamW8bit)
    assert (built.is_8bit, built.is_paged) == ("8bit" in name, "paged" in name)
    assert not isinstance(build_optimizer(named, TrainSettings(), MethodSettings()), AdamW8bit)
    run_job(make_job(tmp_path / "through", recipe, model=big_model()))
    run_job(make_job(tmp_path / "cut", recipe, model=big_model()), stop_at=3)
    run_job(make_job(tmp_path / "cut", recipe, model=big_model(), resume=True))
    ends = [read_newest_checkpoint(tmp_path / name / "checkpoints", print)
            for name in ("through", "cut")]  # fmt: skip
    assert any(key.endswith("_codes") for key in ends[0].moments) == ("8bit" in name)
    for kind in ("trained", "moments"):
        first, second = (getattr(end, kind) for end in ends)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_starter_learns_with_it_as_with_exact_moments(tmp_path):
    """LoRA of rank 32 on the embedded skills; the mean loss of the last steps is within 3 %."""
    from lorakeet.base.recipe_file import recipe_from_dict
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.load import load_model
    from lorakeet.models.methods import apply_method
    from lorakeet.train.step import build_runner

    means, kept = {}, {}
    for name in ("adamw", "adamw-8bit"):
        recipe = recipe_from_dict({
            "base": "starter", "method": {"rank": 32, "alpha": 64},
            "data": {"train": str(write_questions(tmp_path)), "validation": 0},
            "train": {"optimizer": name, "learning_rate": 2e-3},
        })  # fmt: skip
        model, tokenizer = load_model("starter")
        apply_method(model, recipe.method, task="chat", seed=0)
        rows = prepare_data(recipe, tokenizer, tmp_path / "data", lambda *a, **k: None).train
        runner = build_runner(model, recipe, pad_id=0)
        losses = [
            runner.run([rows[(4 * step + i) % len(rows)] for i in range(4)], (0, step)).loss
            for step in range(1, 31)
        ]
        means[name], first = sum(losses[-10:]) / 10, losses[0]
        kept[name] = sum(t.numel() * t.element_size() for state in runner.optimizer.state.values()
                         for t in state.values())  # fmt: skip
    assert means["adamw-8bit"] == pytest.approx(means["adamw"], rel=0.03)
    assert means["adamw-8bit"] < 0.7 * first
    assert kept["adamw-8bit"] < 0.27 * kept["adamw"]


def write_questions(folder):
    """Forty questions with answers that follow a rule."""
    path = folder / "rows.jsonl"
    names = "red blue green white black".split()
    rows = [
        {"messages": [{"role": "user", "content": f"Which color has box {n}?"},
                      {"role": "assistant", "content": f"Box {n} is {names[n % 5]}."}]}
        for n in range(40)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def big_model():
    """The usual small model, wide enough for 8-bit moments."""
    import transformers as t

    torch.manual_seed(3)
    config = t.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32,
                          bos_token_id=1, eos_token_id=2, resid_pdrop=0, embd_pdrop=0,
                          attn_pdrop=0)  # fmt: skip
    return t.GPT2LMHeadModel(config).eval()


def walk(optimizer_of, steps=3):
    """A matrix above and a vector below the 8-bit size after a few steps."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(PIECE + 5000)), torch.nn.Parameter(torch.randn(9))]
    optimizer = optimizer_of(weights)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    return [weight.detach() for weight in weights], optimizer


def test_paged_moments_make_the_same_steps_in_every_bit():
    plain, _ = walk(lambda weights: AdamW8bit(weights, lr=1e-2))
    paged, optimizer = walk(lambda weights: AdamW8bit(weights, lr=1e-2, is_paged=True))
    assert all(map(torch.equal, plain, paged))
    assert {v.device.type for state in optimizer.state.values() for v in state.values()} == {"cpu"}


def test_paged_moments_in_float32_make_the_steps_of_adamw():
    expected, _ = walk(lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0))
    found, optimizer = walk(lambda ws: AdamW8bit(ws, lr=1e-2, is_8bit=False, is_paged=True))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all("exp_avg" in state for state in optimizer.state.values())


def test_moments_that_lie_elsewhere_than_the_weight_are_brought_and_put_back():
    """The walk of a page: from where the state lies to another device and back."""
    state = {"exp_avg_codes": torch.full((512,), 127, dtype=torch.uint8),
             "exp_avg_scales": torch.zeros(2), "exp_avg_sq": torch.zeros(512)}  # fmt: skip
    piece, values = slice(256, 512), draw(256)
    for name in ("exp_avg", "exp_avg_sq"):
        assert _read(state, name, piece, torch.device("meta")).is_meta
        _write(state, name, piece, values)
    codes, scales = quantize_blocks(values, is_signed=True)
    found = _read(state, "exp_avg", piece, torch.device("cpu"))
    assert torch.equal(found, dequantize_blocks(codes, scales, is_signed=True))
    assert torch.equal(state["exp_avg_sq"][piece], values)
    assert not state["exp_avg_sq"][:256].any()
