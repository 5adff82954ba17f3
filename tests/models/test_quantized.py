"""A base read straight into few bits: the same weights, little memory, a cache, clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakeet
from lorakeet.adapters.targets import linear_names
from lorakeet.base.errors import FileFormatError, MachineError, NumericsError, RequestError
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.models import quantized_cache
from lorakeet.models.load import load_model, resolve_base
from lorakeet.quant.convert import QuantizedForm, dequantize_model, quantize_model
from lorakeet.quant.linear import QuantizedLinear
from tests.families import ALL, DECODERS, build, some_ids

STARTER = Path(lorakeet.__file__).parent / "embedded" / "starter"
LABELS = ("a", "b", "c")


def settings(kind="nf4", **more):
    return QuantizationSettings(kind=kind, **more)


def write_base(folder, family, **save):
    """A tiny model of a family as a folder, with the starter's tokenizer."""
    model = build(family)
    model.save_pretrained(folder, **save)
    for path in STARTER.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return model


def task_of(family):
    is_decoder = family in DECODERS
    return {} if is_decoder else {"task": "classify", "label_names": LABELS}


def answer(model):
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


def quantized_layers(model):
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]


@pytest.mark.parametrize("family", ALL)
def test_the_loaded_model_is_the_one_quantised_in_memory(family, tmp_path):
    write_base(tmp_path, family)
    plain, _ = load_model(str(tmp_path), **task_of(family))
    names = linear_names(plain)
    quantize_model(plain, names, QuantizedForm())
    model, _ = load_model(str(tmp_path), quantization=settings(), **task_of(family))
    assert quantized_layers(model) == names
    assert torch.equal(answer(model), answer(plain))
    expected = plain.state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not model.training
    heads = [m.get_output_embeddings() for m in (model, plain) if family in DECODERS]
    for each in heads:
        shares = each.weight is model.get_input_embeddings().weight
        assert shares == (model.config.tie_word_embeddings and each is heads[0])


def test_shards_and_files_of_the_inner_model_are_read(tmp_path):
    model = write_base(tmp_path / "shards", "llama", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    sharded, _ = load_model(str(tmp_path / "shards"), quantization=settings())
    write_base(tmp_path / "whole", "llama")
    whole, _ = load_model(str(tmp_path / "whole"), quantization=settings())
    assert torch.equal(answer(sharded), answer(whole))
    write_base(tmp_path / "inner", "llama-tied")
    build("llama-tied").model.save_pretrained(tmp_path / "inner")
    inner, _ = load_model(str(tmp_path / "inner"), quantization=settings())
    write_base(tmp_path / "tied", "llama-tied")
    tied, _ = load_model(str(tmp_path / "tied"), quantization=settings())
    assert torch.equal(answer(inner), answer(tied))
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_cache_gives_the_same_model_and_is_mapped(family, tmp_path):
    write_base(tmp_path / "base", family)
    for kind in ("nf4", "fp4", "int8"):
        form = settings(kind, cache=str(tmp_path / "cache"))
        first, _ = load_model(str(tmp_path / "base"), quantization=form, **task_of(family))
        again, _ = load_model(str(tmp_path / "base"), quantization=form, **task_of(family))
        expected, found = first.state_dict(), again.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(answer(first), answer(again))
        assert quantized_layers(again) == quantized_layers(first)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_the_cache_is_made_anew_for_another_base_and_when_damaged(tmp_path, monkeypatch):
    form = settings(cache=str(tmp_path / "cache"))
    base = tmp_path / "base"
    write_base(base, "llama")
    written = []
    real = quantized_cache.write_cache
    monkeypatch.setattr(quantized_cache, "write_cache", lambda *a: (written.append(1), real(*a))[1])

    def load():
        load_model(str(base), quantization=form)
        return len(written)

    assert [load(), load()] == [1, 1]
    (base / "model.safetensors").touch()  # another time, the same bytes
    assert load() == 1
    build("llama", seed=7).save_pretrained(base)
    assert load() == 2
    stored = next((tmp_path / "cache").glob("*/model.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-9])
    assert load() == 3
    next((tmp_path / "cache").glob("*/cache.json")).write_text("{")
    assert load() == 4


def test_transformers_and_bitsandbytes_open_the_cache(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    write_base(tmp_path / "base", "llama")
    form = settings(cache=str(tmp_path / "cache"))
    ours, _ = load_model(str(tmp_path / "base"), quantization=form)
    place = next((tmp_path / "cache").iterdir())
    theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    torch.testing.assert_close(answer(theirs), answer(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-plain", "fp4", "int8"])
def test_a_checkpoint_of_bitsandbytes_is_read_as_it_is(family, kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    write_base(tmp_path / "base", family)
    config = BitsAndBytesConfig(load_in_8bit=True)
    if kind != "int8":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind[:3],
            bnb_4bit_use_double_quant=kind != "nf4-plain", bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.float32
    )
    write_base(tmp_path / "quantised", family)
    (tmp_path / "quantised" / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "quantised")
    model, _ = load_model(str(tmp_path / "quantised"))
    layers = quantized_layers(model)
    assert layers
    assert {model.get_submodule(name).kind for name in layers} == {kind[:4].removesuffix("-")}
    if kind != "int8":  # theirs rounds the activations too
        torch.testing.assert_close(answer(model), answer(theirs.eval()), rtol=1e-4, atol=1e-4)
    plain, _ = load_model(str(tmp_path / "base"), quantization=settings(kind[:4].rstrip("-")))
    torch.testing.assert_close(answer(model), answer(plain), rtol=0.05, atol=0.05)
    with pytest.raises(RequestError, match="quantised to .* already"):
        other = "nf4" if kind == "int8" else "int8"
        load_model(str(tmp_path / "quantised"), quantization=settings(other))


def test_what_is_quantised_follows_the_patterns(tmp_path):
    write_base(tmp_path, "llama")

    def chosen(**patterns):
        model, _ = load_model(str(tmp_path), quantization=settings(**patterns))
        return quantized_layers(model)

    every = chosen()
    assert len(every) == 14
    assert chosen(include=r".*\.mlp\..*") == [name for name in every if ".mlp." in name]
    assert chosen(include=("mlp",)) == [name for name in every if ".mlp." in name]
    assert chosen(exclude=("model.layers.0", "down_proj")) == [
        name for name in every if ".layers.1." in name and "down_proj" not in name
    ]
    assert "lm_head" in chosen(include=("lm_head", "up_proj"))
    with pytest.raises(RequestError, match="'up_prj' leaves no linear layer"):
        chosen(exclude=("up_prj",))
    with pytest.raises(RequestError, match="leaves no linear layer"):
        chosen(include="nothing")


def test_the_model_holds_the_bytes_that_its_form_says(tmp_path):
    model, _ = load_model("starter")
    plain = sum(p.numel() for p in model.parameters())
    small, _ = load_model("starter", quantization=settings())
    layers = [m for m in small.modules() if isinstance(m, QuantizedLinear)]
    num = sum(layer.num_weights for layer in layers)
    assert sum(layer.held_bytes for layer in layers) / num == pytest.approx(0.516, abs=0.001)
    rest = sum(p.numel() for p in small.parameters())
    assert rest + num == plain
    assert len({id(layer.scale_levels) for layer in layers}) == 1
    assert len({id(layer.scratch) for layer in layers}) == 1


def test_loading_holds_one_large_tensor_at_a_time(tmp_path):
    """The largest live memory above the model, measured where torch allocates."""
    from weakref import finalize

    from torch.utils._python_dispatch import TorchDispatchMode

    class Live(TorchDispatchMode):
        now = most = 0
        seen = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                    self.note(each.untyped_storage())
            return out

        def note(self, storage):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.seen and size:
                self.seen[key] = size
                self.now += size
                self.most = max(self.most, self.now)
                finalize(storage, self.forget, key)

        def forget(self, key):
            self.now -= self.seen.pop(key, 0)

    config = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    from transformers import LlamaConfig, LlamaForCausalLM

    big = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=4, vocab_size=96))
    write_base(tmp_path, "llama")
    big.save_pretrained(tmp_path)
    largest = 512 * 256 * 4
    with Live() as live:
        model, _ = load_model(str(tmp_path), quantization=settings())
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    whole = sum(p.numel() * 4 for p in big.parameters())
    assert live.most < held + 6 * largest < whole


def test_bad_bases_are_refused_with_their_reason(tmp_path):
    base = tmp_path / "base"
    model = write_base(base, "llama")
    with pytest.raises(RequestError, match="cannot be cut into blocks of 4096"):
        load_model(str(base), quantization=settings(block_size=4096))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(base)
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN or infinity"):
        load_model(str(base), quantization=settings())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(FileFormatError, match="other shapes than config.json"):
        load_model(str(base), quantization=settings())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(FileFormatError, match="9 weights are in no file"):
        load_model(str(base), quantization=settings())
    method = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (base / "config.json").write_text(json.dumps(config | method))
    with pytest.raises(FileFormatError, match="quantised by 'gptq'"):
        resolve_base(str(base))  # before any work


def test_a_full_disk_is_told_with_what_is_needed(tmp_path, monkeypatch):
    write_base(tmp_path / "base", "llama")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(quantized_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match="1,000 are free.*quantization.cache"):
        load_model(str(tmp_path / "base"), quantization=settings(cache=str(tmp_path / "cache")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_dequantising_a_loaded_model_gives_plain_layers(tmp_path):
    write_base(tmp_path, "llama")
    model, _ = load_model(str(tmp_path), quantization=settings("int8"))
    expected = answer(model)
    dequantize_model(model)
    assert not quantized_layers(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    torch.testing.assert_close(answer(model), expected)
