"""A trial takes the longest rows, a sweep leaves nothing behind; both through real steps."""

import math
from dataclasses import replace

import pytest
import torch

from lorakeet.base.errors import DataError
from lorakeet.models.methods import apply_method
from lorakeet.train import trial as trial_module
from lorakeet.train.step import build_runner
from lorakeet.train.sweep import FACTOR, sweep_rates
from lorakeet.train.trial import choose_longest, try_steps
from tests.train.runs import Listener, digest_of, make_data, make_model, make_recipe


@pytest.fixture
def make(tmp_path):
    def build(kind="lora", count=24, **train):
        recipe, model = make_recipe(kind, **train), make_model()
        apply_method(model, recipe.method, task="chat", seed=0)
        return model, recipe, make_data(tmp_path / "data", count)

    return build


def test_the_longest_rows_fill_two_micro_batches_and_no_more_than_a_step(make):
    model, recipe, data = make(micro_batch_tokens=40)
    runner = build_runner(model, recipe, pad_id=0)
    lengths = sorted((int(n) for n in data.train.lengths), reverse=True)
    chosen = choose_longest(data.train, runner, recipe.train.batch_size)
    assert [len(row.ids) for row in chosen] == lengths[: len(chosen)]
    assert len(runner.cut(chosen)) == 2
    assert len(choose_longest(data.train, runner, 3)) == 3
    alone = replace(runner, micro_batch_tokens=1)
    assert len(choose_longest(data.train, alone, 8)) == 2, "a row above the limit stands alone"


def test_a_trial_tells_the_peak_and_the_rate_of_real_steps(make):
    model, recipe, data = make(micro_batch_tokens=40)
    heard = Listener()
    trial = try_steps(model, recipe, data, pad_id=0, emit=heard)
    assert trial.peak_bytes > 50e6 and trial.tokens_per_s > 0 and trial.num_steps >= 1
    assert 20 <= trial.longest_tokens <= 40 and trial.micro_batch_tokens == 40
    assert not heard.events


def test_the_second_step_is_made_beside_what_a_checkpoint_copies(make, monkeypatch):
    model, recipe, data = make("full", micro_batch_tokens=160)
    seen = []

    def note(name):
        original = getattr(trial_module, name)

        def call(*args, **options):
            seen.append(name)
            return original(*args, **options)

        monkeypatch.setattr(trial_module, name, call)

    for name in ("collect_state", "collect_moments", "run_within_memory", "peak_bytes"):
        note(name)
    try_steps(model, recipe, data, pad_id=0, emit=Listener())
    step = "run_within_memory"
    assert seen == ["collect_state", step, "collect_state", "collect_moments", step, "peak_bytes"]


def test_a_trial_tells_the_micro_batch_that_fits(make):
    model, recipe, data = make("full", micro_batch_tokens=160)

    def refuse(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids.numel() > 45:
            raise MemoryError

    model.transformer.register_forward_pre_hook(refuse, with_kwargs=True)
    assert try_steps(model, recipe, data, pad_id=0, emit=Listener()).micro_batch_tokens <= 45


def test_a_sweep_is_the_same_twice_and_leaves_weights_and_random_numbers(make):
    model, recipe, data = make("full")
    before, state = digest_of(model), torch.get_rng_state()
    first, second = (sweep_rates(model, recipe, data, pad_id=0, emit=Listener()) for _ in "ab")
    assert first == second
    assert digest_of(model) == before and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rate", [1e-5, 3e-2])
def test_a_sweep_finds_the_rate_with_the_lowest_loss_and_goes_on_beyond_an_end(make, rate):
    model, recipe, data = make("full", learning_rate=rate)
    found = sweep_rates(model, recipe, data, pad_id=0, emit=Listener())
    losses = {r.rate: math.inf if r.loss is None else r.loss for r in found.results}
    assert found.best == min(losses, key=losses.get)
    rates = sorted(losses)
    assert all(b / a == pytest.approx(FACTOR) for a, b in zip(rates, rates[1:], strict=False))
    if rate == 1e-5:
        assert rates[-1] == pytest.approx(1e-5 * FACTOR**3) and not found.is_bracketed
    else:
        assert found.is_bracketed and found.best not in (rates[0], rates[-1])
        assert losses[found.best] < found.first_loss


def test_a_rate_that_diverges_is_told_and_not_chosen(make):
    model, recipe, data = make("full", learning_rate=1e30, max_gradient_norm=1e9)
    found = sweep_rates(model, recipe, data, pad_id=0, emit=Listener())
    worst = found.results[-1].loss
    assert worst is None or worst > found.first_loss
    assert found.best < 1e30


def test_too_few_rows_for_a_sweep_are_an_error(make):
    model, recipe, data = make("full", count=1)
    data = replace(data, validation=[])
    with pytest.raises(DataError, match="too few"):
        sweep_rates(model, recipe, data, pad_id=0, emit=Listener())
