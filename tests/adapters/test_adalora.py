"""AdaLoRA's budget: how it falls, what stays, and what it refuses."""

import pytest
import torch

from lorakeet.adapters.adalora import RankAllocator, build_allocator
from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.settings import AdaLora
from lorakeet.base.errors import RequestError
from lorakeet.base.recipe_file import recipe_from_dict
from tests.families import build, some_ids
from tests.train.runs import make_job, make_model, run_job

torch.set_num_threads(1)
TARGETS = ("q_proj", "down_proj")


def build_allocated(steps=100, **options):
    model = build("llama")
    settings = AdaLora(target_rank=2, **options)
    attach(model, Lora(rank=6, targets=TARGETS, adalora=settings))
    return model, RankAllocator(model, "default", settings, steps)


def test_the_budget_falls_from_all_to_the_target_and_stays():
    _, allocator = build_allocated(every_steps=1)
    budgets = [allocator.budget_at(step) for step in range(1, 101)]
    assert budgets[:10] == [24] * 10 and budgets[69:] == [8] * 31
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[39] == int(8 + 16 * 0.5**3)


def test_ties_never_take_more_than_the_budget_says():
    model, allocator = build_allocated()
    for parameter in adapter_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.add_(1.0 if "lora_E" in name else 0.0)
    for step in range(1, 101):
        allocator.update(step)
    assert sum(allocator.ranks().values()) == 8


def test_an_allocator_taken_up_from_its_tensors_goes_on_alike():
    model, allocator = build_allocated()
    other, second = build_allocated()
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 101):
        if step == 41:
            second.restore(allocator.to_tensors())
        for name, parameter in adapter_parameters(model).items():
            with torch.no_grad():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                parameter.sub_(0.01 * parameter.grad)
                twin = adapter_parameters(other)[name]
                twin.copy_(parameter)
                twin.grad = parameter.grad.clone()
        allocator.update(step)
        if step > 40:
            second.update(step)
    assert allocator.ranks() == second.ranks()


def test_the_penalty_is_the_mean_distance_from_orthonormal():
    model, allocator = build_allocated(orthogonality=0.25)
    layers = [model.get_submodule(path) for path in allocator.layers]
    with torch.no_grad():
        for layer in layers:
            for factor in layer.factors("default"):
                torch.nn.init.orthogonal_(factor)
        assert allocator.penalty() < 1e-5
        layers[0].factors("default")[0].zero_()
    assert torch.allclose(allocator.penalty(), torch.tensor(0.25 * 6**0.5 / 8))


def test_a_run_that_is_too_short_to_score_is_refused():
    with pytest.raises(RequestError, match="no rank can be scored"):
        build_allocated(steps=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dora": True}, "dora cannot be on"),
        ({"start": "pissa"}, "start cannot be on"),
        ({"adalora": AdaLora(target_rank=9)}, "target_rank is 9"),
        ({"adalora": AdaLora(target_rank=2, settle_fraction=0.95)}, "sum below 1"),
        ({"adalora": AdaLora(target_rank=2, beta1=1.0)}, "beta1"),
        ({"adalora": AdaLora(target_rank=2, every_steps=0)}, "every_steps"),
    ],
)
def test_contradicting_settings_are_refused(options, words):
    with pytest.raises(RequestError, match=words):
        Lora(**{"rank": 4, "adalora": AdaLora(target_rank=2), **options})


def test_embeddings_and_untrained_adapters_are_refused(tmp_path):
    settings = AdaLora(target_rank=2)
    with pytest.raises(RequestError, match="not embeddings"):
        attach(build("llama"), Lora(rank=4, targets=("embed_tokens",), adalora=settings))
    model = build_allocated()[0]
    with pytest.raises(RequestError, match="nothing to write"):
        write_adapter(model, tmp_path / "a", base="b")
    assert build_allocator(build("llama"), 10) is None


def test_a_training_run_ends_on_the_budget_and_its_file_answers_the_same(tmp_path):
    recipe = recipe_from_dict({
        "base": "x", "data": {"train": "rows.jsonl"},
        "method": {"rank": 4, "adalora": {"target_rank": 2, "every_steps": 1}},
        "train": {"epochs": 10, "batch_size": 8, "learning_rate": 1e-2,
                  "evaluate_every_steps": 2, "early_stopping": {"metric": "loss"}},
    })  # fmt: skip
    job = make_job(tmp_path, recipe)
    result, heard = run_job(job)
    ranks = heard.all("ranks")[0]["ranks"]
    assert sum(ranks.values()) == 2 * len(ranks) and len(set(ranks.values())) > 1
    assert result.best_step >= 0.7 * 30
    write_adapter(job.model, tmp_path / "a", base="x")
    back = make_model()
    read_adapter(back, tmp_path / "a")
    ids = some_ids() % 60
    assert torch.allclose(back(ids).logits, job.model(ids).logits, atol=1e-5)
