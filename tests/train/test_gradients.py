"""Gradients that are moved to places of their own stay the same numbers."""

import torch

from lorakeet.train.gradients import build_places, move_gradients
from lorakeet.train.optimizer import build_optimizer
from lorakeet.train.step import StepRunner
from tests.train.runs import make_model, make_rows


def gradients(monkeypatch, micro_batch_tokens, *, has_places):
    from lorakeet.base.method_settings import MethodSettings
    from lorakeet.base.recipe import TrainSettings

    model = make_model()
    named = list(model.named_parameters())
    parameters = tuple(p for _, p in named if p.requires_grad)
    runner = StepRunner(
        model=model, optimizer=build_optimizer(named, TrainSettings(), MethodSettings()),
        parameters=parameters, pad_id=0, micro_batch_tokens=micro_batch_tokens,
        max_gradient_norm=1e9, places=build_places(parameters) if has_places else (),
    )  # fmt: skip
    seen = []

    def keep(*arguments, **options):
        seen.extend((p.grad.clone(), p.grad.data_ptr()) for p in parameters)

    monkeypatch.setattr(runner.optimizer, "step", keep)
    runner.run(list(make_rows(8)), (0, 1))
    assert all(p.grad is None for p in parameters)
    return seen, {place.data_ptr() for place in runner.places}


def test_moved_gradients_are_the_same_bit_for_bit(monkeypatch):
    for micro_batch_tokens in (24, 4096):  # many micro-batches, and one
        plain, _ = gradients(monkeypatch, micro_batch_tokens, has_places=False)
        moved, places = gradients(monkeypatch, micro_batch_tokens, has_places=True)
        assert all(torch.equal(one, two) for (one, _), (two, _) in zip(plain, moved, strict=True))
        assert {address for _, address in moved} == places


def test_a_parameter_without_a_gradient_keeps_none():
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    places = build_places(parameters)
    parameters[0].sum().backward()
    move_gradients(parameters, places)
    assert parameters[0].grad.tolist() == [1, 1, 1] and parameters[1].grad is None
