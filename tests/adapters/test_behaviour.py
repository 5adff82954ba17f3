"""One behaviour matrix that every family passes."""

import pytest
import torch

from lorakeet.adapters.attach import (
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    no_adapter,
    set_active,
)
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.merge import merge, unmerge
from lorakeet.adapters.targets import select_targets
from lorakeet.base.errors import FileFormatError, NumericsError, RequestError
from tests.families import ALL, build, some_ids

families = pytest.mark.parametrize("family", list(ALL))
LORA = Lora(rank=4, alpha=8)


def answer(model):
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


def move(model, name="default", seed=5):
    """Gives an adapter weights as training would: B away from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@families
def test_a_new_adapter_changes_nothing_and_detaching_restores_the_very_objects(family):
    model = build(family)
    before, modules = answer(model), dict(model.named_modules())
    report = attach(model, LORA)
    assert torch.equal(answer(model), before)
    assert report.trained_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    move(model)
    assert not torch.allclose(answer(model), before)
    with no_adapter(model):
        assert torch.equal(answer(model), before)
    detach(model)
    assert torch.equal(answer(model), before)
    assert dict(model.named_modules()) == modules


@families
def test_only_the_adapter_gets_gradients(family):
    model = build(family)
    attach(model, LORA)
    model(input_ids=some_ids()).logits.square().mean().backward()
    trained = adapter_parameters(model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


@families
def test_merging_keeps_the_answers_and_unmerging_restores_every_bit(family):
    model = build(family)
    attach(model, LORA)
    move(model)
    apart = answer(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    merge(model)
    assert torch.allclose(answer(model), apart, atol=2e-5)
    unmerge(model)
    assert torch.equal(answer(model), apart)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@families
def test_a_written_adapter_reads_back_with_equal_answers(family, tmp_path):
    model = build(family)
    attach(model, LORA, seed=3)
    move(model)
    write_adapter(model, tmp_path / "a", base="some/base", lineage={"data": "x"})
    other = build(family)
    assert read_adapter(other, tmp_path / "a").rank == 4
    assert torch.equal(answer(other), answer(model))
    assert not any(p.requires_grad for p in adapter_parameters(other).values())


@families
def test_adapters_switch_without_touching_each_other(family):
    model = build(family)
    answers = {}
    for number, name in enumerate(("one", "two")):
        attach(model, LORA, name=name, seed=number)
        move(model, name, seed=number)
        answers[name] = answer(model)
    assert not torch.allclose(answers["one"], answers["two"])
    for name in ("one", "two", "one"):
        set_active(model, name)
        assert torch.equal(answer(model), answers[name])
    detach(model, "two")
    assert adapter_names(model) == ["one"]
    set_active(model, "one")
    assert torch.equal(answer(model), answers["one"])


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma"])
def test_an_adapted_embedding_that_is_tied_to_the_head_merges_rightly(family):
    model = build(family)
    name = "wte" if family == "gpt2" else "embed_tokens"
    attach(model, Lora(rank=2, alpha=4, targets=(name,)))
    move(model)
    apart = answer(model)
    merge(model)
    assert torch.allclose(answer(model), apart, atol=2e-5)
    assert model.config.tie_word_embeddings is False


def test_patterns_and_exclusions_choose_rank_alpha_and_modules():
    model = build("llama")
    settings = Lora(
        rank=4, alpha=8, targets=("q_proj", "down_proj"), exclude=("layers.1.self_attn.q_proj",),
        rank_pattern={"down_proj": 2}, alpha_pattern={r"layers\.0\.self_attn\.q_proj": 16},
    )  # fmt: skip
    report = attach(model, settings)
    ranks = {name: r for name, (r, _) in report.targets.items()}
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.0.mlp.down_proj": 2,
        "model.layers.1.mlp.down_proj": 2,
    }
    assert model.get_submodule("model.layers.0.self_attn.q_proj").scales["default"] == 4
    assert model.get_submodule("model.layers.1.mlp.down_proj").scales["default"] == 4


def test_a_regular_expression_is_matched_over_the_whole_name():
    model = build("llama")
    found = select_targets(model, Lora(targets=r".*layers\.1\..*_proj"))
    assert len(found) == 7 and all(".layers.1." in name for name in found)


def test_all_linear_leaves_out_the_heads():
    assert "lm_head" not in select_targets(build("llama"), Lora())
    names = select_targets(build("bert"), Lora())
    assert not any("classifier" in name for name in names)
    assert any(name.endswith("intermediate.dense") for name in names)


def test_a_saved_module_is_trained_in_full_and_merged():
    model = build("bert")
    before = answer(model)
    attach(
        model, Lora(rank=2, alpha=4, targets=("query", "value"), modules_to_save=("classifier",))
    )
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("classifier.modules_to_save.default.weight" in n for n in names)
    move(model)
    apart = answer(model)
    merge(model)
    assert torch.allclose(answer(model), apart, atol=1e-5)
    detach(model)
    assert torch.allclose(answer(model), apart, atol=1e-5)
    assert not torch.allclose(apart, before)


def test_the_seed_and_the_name_of_the_module_decide_A():
    one, two, three = build("llama"), build("llama"), build("llama")
    torch.manual_seed(99)
    attach(one, LORA, seed=1)
    attach(two, LORA, seed=1)
    attach(three, LORA, seed=2)
    same = [adapter_parameters(m) for m in (one, two, three)]
    assert all(torch.equal(a, b) for a, b in zip(same[0].values(), same[1].values(), strict=True))
    assert not torch.equal(next(iter(same[0].values())), next(iter(same[2].values())))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ("score",), "modules_to_save": ("score",)}, "not both"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(RequestError, match=words):
        Lora(**settings)


def test_what_does_not_fit_the_model_is_refused_and_leaves_it_unchanged():
    model = build("llama")
    modules = dict(model.named_modules())
    with pytest.raises(RequestError, match="Near names: .*q_proj"):
        attach(model, Lora(targets=("q_porj",)))
    with pytest.raises(RequestError, match="rank 64 is larger"):
        attach(model, Lora(rank=64))
    with pytest.raises(RequestError, match="no such module"):
        attach(model, Lora(modules_to_save=("classifier",)))
    assert dict(model.named_modules()) == modules
    attach(model, LORA)
    with pytest.raises(RequestError, match="already has"):
        attach(model, LORA)


def test_a_merge_that_is_not_finite_changes_nothing():
    model = build("llama")
    attach(model, LORA)
    move(model)
    with torch.no_grad():
        next(iter(adapter_parameters(model).values())).fill_(float("inf"))
    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight.clone()
    with pytest.raises(NumericsError):
        merge(model)
    assert torch.equal(model.get_submodule("model.layers.1.mlp.up_proj").weight, weight)


def test_an_adapter_of_another_base_is_refused_and_leaves_the_model_unchanged(tmp_path):
    model = build("llama")
    attach(model, LORA)
    write_adapter(model, tmp_path / "a", base="b")
    other = build("gpt2")
    modules = dict(other.named_modules())
    with pytest.raises(FileFormatError, match="does not fit"):
        read_adapter(other, tmp_path / "a")
    assert dict(other.named_modules()) == modules
