"""A step is the gradient of the summed loss over the step's targets, however it is cut."""

import math

import pytest
import torch

from lorakeet.base.errors import NumericsError, RequestError
from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.recipe import TrainSettings
from lorakeet.train.optimizer import build_optimizer, set_rate
from lorakeet.train.randomness import hash_seed
from lorakeet.train.schedule import rate_at
from lorakeet.train.step import StepRunner
from tests.train.runs import digest_of, make_model, make_rows


def make_runner(model, micro_batch_tokens=2048, **limits):
    settings = TrainSettings(learning_rate=1e-2)
    named = list(model.named_parameters())
    return StepRunner(
        model=model, optimizer=build_optimizer(named, settings, MethodSettings(kind="full")),
        parameters=tuple(p for _, p in named), pad_id=0, micro_batch_tokens=micro_batch_tokens,
        max_gradient_norm=limits.get("max_gradient_norm", 1.0),
    )  # fmt: skip


def gradients_of(monkeypatch, micro_batch_tokens, split):
    """The gradients that reach the optimiser."""
    model = make_model()
    runner = make_runner(model, micro_batch_tokens, max_gradient_norm=1e9)
    seen = {}

    def keep(*_):
        seen.update({n: p.grad.clone() for n, p in model.named_parameters()})

    runner.optimizer.register_step_pre_hook(keep)
    monkeypatch.setattr("lorakeet.train.step.split_micro_batches", split)
    return runner.run(list(make_rows(8)), (0, 1)), seen


def test_one_by_eight_is_two_by_four_is_eight_by_one(monkeypatch):
    cuts = [
        lambda lengths, _, size=size: [
            list(range(start, start + size)) for start in range(0, len(lengths), size)
        ]
        for size in (8, 4, 1)
    ]
    (whole, expected), *others = [gradients_of(monkeypatch, 0, cut) for cut in cuts]
    for result, found in others:
        assert result.loss == pytest.approx(whole.loss, rel=1e-6)
        assert result.num_targets == whole.num_targets == sum(r.mask.sum() for r in make_rows(8))
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-6 * (1 + gradient.abs().max()), name


def test_many_steps_agree_whatever_the_micro_batches():
    ends = []
    for tokens in (20, 40, 4096):
        model = make_model()
        runner = make_runner(model, tokens)
        losses = [runner.run(list(make_rows(8, seed)), (0, seed)).loss for seed in range(6)]
        ends.append(losses)
    assert ends[0] == pytest.approx(ends[2], rel=1e-4)
    assert ends[1] == pytest.approx(ends[2], rel=1e-4)


def test_dropout_depends_on_seed_and_step_alone_and_the_caller_keeps_its_generator():
    model = make_model(dropout=0.3).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)):
        model.load_state_dict(before, strict=False)
        torch.manual_seed(len(losses))
        state = torch.get_rng_state()
        losses.append(make_runner(model).run(list(make_rows(8)), (seed, step)).loss)
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_seeds_of_steps_and_runs_differ():
    assert len({hash_seed(seed, step) for seed in range(50) for step in range(200)}) == 10_000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_step_and_names_its_rows(value):
    model = make_model()
    rows = list(make_rows(8))
    culprit = int(rows[5].ids[0])
    with torch.no_grad():
        model.transformer.wte.weight[culprit] = value
    before, runner = digest_of(model), make_runner(model, 21)
    with pytest.raises(NumericsError, match=r"step 7: .*rows\.jsonl line ") as caught:
        runner.run(rows, (0, 7))
    assert "weights are untouched" in str(caught.value)
    assert digest_of(model) == before
    assert not runner.optimizer.state and all(p.grad is None for p in model.parameters())


def test_only_the_broken_micro_batch_is_named():
    model = make_model()
    rows = list(make_rows(8))
    lonely = [i for i, r in enumerate(rows) if len(r.ids) == max(len(q.ids) for q in rows)][0]
    position = len(rows[lonely].ids) - 1
    if sum(len(r.ids) > position for r in rows) > 1:
        rows = [r for i, r in enumerate(rows) if i == lonely or len(r.ids) <= position]
    with torch.no_grad():
        model.transformer.wpe.weight[position] = math.nan
    with pytest.raises(NumericsError) as caught:
        make_runner(model, 1).run(rows, (0, 1))
    named = [r for r in rows if f"line {r.origin.line}." in str(caught.value)]
    assert [len(r.ids) for r in named] == [position + 1]


def test_gradients_are_clipped_to_the_norm(monkeypatch):
    model = make_model()
    runner = make_runner(model, max_gradient_norm=0.01)
    norms = []
    runner.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        )
    )
    result = runner.run(list(make_rows(8)), (0, 1))
    assert result.gradient_norm > 0.01 and norms == [pytest.approx(0.01, rel=1e-3)]


def test_decay_acts_on_matrices_and_b_is_faster_under_lora_plus():
    names = {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "norm.weight": (8,)}
    parameters = [(name, torch.nn.Parameter(torch.ones(size))) for name, size in names.items()]
    train = TrainSettings(weight_decay=0.1)
    optimizer = build_optimizer(parameters, train, MethodSettings(lora_plus_ratio=16))
    set_rate(optimizer, 1e-3)
    rate, decay = ({}, {})
    for group in optimizer.param_groups:
        for name, parameter in parameters:
            if any(parameter is member for member in group["params"]):
                rate[name], decay[name] = group["lr"], group["weight_decay"]
    assert decay == {"lora_A.weight": 0.1, "lora_B.weight": 0.1, "norm.weight": 0.0}
    assert rate["lora_B.weight"] == pytest.approx(16e-3) and rate["lora_A.weight"] == 1e-3


def test_a_model_without_trained_parameters_is_refused():
    frozen = [("w", torch.nn.Parameter(torch.ones(2), requires_grad=False))]
    with pytest.raises(RequestError, match="no parameter"):
        build_optimizer(frozen, TrainSettings(), MethodSettings())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_rates_rise_to_the_peak_then_never_rise_and_stay_positive(schedule, num_steps, warmup):
    settings = TrainSettings(learning_rate=0.5, schedule=schedule, warmup_fraction=warmup)
    rates = [rate_at(step, num_steps, settings) for step in range(1, num_steps + 1)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.5) and min(rates) > 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
