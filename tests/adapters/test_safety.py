"""What must never happen: a wrong adapter answers, a base is spoilt, a folder is lost."""

import json

import pytest
import torch

from lorakeet.adapters.attach import (
    active_adapter,
    adapter_parameters,
    attach,
    detach,
    no_adapter,
    set_active,
)
from lorakeet.adapters.file_names import to_file_tensors
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.merge import merge, unmerge
from lorakeet.base.errors import FileFormatError, RequestError
from lorakeet.base.method_settings import MethodSettings
from lorakeet.models.methods import apply_method, write_trained
from tests.families import build, some_ids

torch.set_num_threads(1)


def answer(model):
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


def build_moved(family, settings, name="default"):
    model = build(family)
    attach(model, settings, name=name)
    move(model, name)
    return model


def move(model, name):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_dropout_is_off_in_a_model_that_evaluates():
    model = build_moved("llama", Lora(rank=4, dropout=0.5))
    assert torch.equal(answer(model), answer(model))


@pytest.mark.parametrize("name", ["mlp", "0", "model", "lora_A"])
def test_an_adapters_name_never_changes_the_names_in_its_file(name):
    named, plain = build_moved("llama", Lora(rank=2), name), build_moved("llama", Lora(rank=2))
    assert to_file_tensors(named, name).keys() == to_file_tensors(plain, "default").keys()


@pytest.mark.parametrize("name", ["keys", "a.b", "", "a/b"])
def test_a_name_that_torch_cannot_hold_is_refused(name):
    with pytest.raises(RequestError, match="cannot name an adapter"):
        attach(build("llama"), Lora(rank=2), name=name)


def test_while_one_adapter_is_merged_no_other_and_not_the_base_can_be_asked_for():
    model = build_moved("llama", Lora(rank=2), "one")
    attach(model, Lora(rank=2, targets=("q_proj",)), name="two")
    merge(model, "one")
    for wanted in ("two", None):
        with pytest.raises(RequestError, match="'one' is merged"):
            set_active(model, wanted)
    with pytest.raises(RequestError, match="'one' is merged"), no_adapter(model):
        pass
    detach(model, "one")
    move(model, "two")
    merged = answer(model)
    set_active(model, "two")
    assert not torch.allclose(answer(model), merged)


def test_unmerging_ties_the_head_again_and_detaching_restores_the_flags():
    model = build_moved("llama-tied", Lora(rank=2, targets=("embed_tokens",)))
    merge(model)
    unmerge(model)
    detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings and all(p.requires_grad for p in model.parameters())


def test_a_saved_module_works_beside_a_bfloat16_base_and_unmerges_bit_for_bit():
    model = build("bert").bfloat16()
    attach(model, Lora(rank=2, targets=("query",), modules_to_save=("classifier",)))
    move(model, "default")
    assert answer(model).dtype == torch.bfloat16
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merge(model)
    unmerge(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name])


def test_what_fails_leaves_the_other_adapter_active_and_trainable(tmp_path):
    write_adapter(build_moved("llama", Lora(rank=2)), tmp_path / "a", base="b")
    model = build_moved("gpt2", Lora(rank=2), "one")
    with pytest.raises(RequestError):
        attach(model, Lora(rank=999), name="two")
    with pytest.raises(FileFormatError):
        read_adapter(model, tmp_path / "a", name="two")
    assert active_adapter(model) == "one"
    assert all(p.requires_grad for p in adapter_parameters(model, "one").values())


def test_writing_never_removes_a_folder_of_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(RequestError, match="holds other files"):
        write_adapter(build_moved("llama", Lora(rank=2)), tmp_path, base="b")
    assert (tmp_path / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("change", ["flip", "cut", "gone", "no-hashes", "list", "pissa"])
def test_a_damaged_or_foreign_folder_is_refused_and_leaves_the_model_unchanged(tmp_path, change):
    folder = write_adapter(build_moved("llama", Lora(rank=2)), tmp_path / "a", base="b")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if change == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
        (folder / "lorakeet.json").unlink()
    elif change == "gone":
        weights.rename(folder / "adapter_model.bin")
    elif change == "no-hashes":
        (folder / "lorakeet.json").write_text("{}")
    else:
        (folder / "lorakeet.json").unlink()
        content = json.loads(config.read_text()) | {"init_lora_weights": "pissa"}
        config.write_text("[]" if change == "list" else json.dumps(content))
    model = build("llama")
    modules = dict(model.named_modules())
    with pytest.raises(FileFormatError):
        read_adapter(model, folder)
    assert dict(model.named_modules()) == modules


def test_a_target_inside_the_new_head_is_trained_with_the_head():
    report = apply_method(
        build("roberta"), MethodSettings(targets=("query", "dense"), rank=2),
        task="classify", seed=0,
    )  # fmt: skip
    assert report.targets and not any("classifier" in name for name in report.targets)


def test_a_model_with_nan_is_not_written(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(FileFormatError, match="lm_head.weight"):
        write_trained(model, MethodSettings(kind="full"), tmp_path / "m", "b", {})
    assert not (tmp_path / "m").exists()
