import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorakeet.adapters.attach import attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.base.errors import MachineError, MismatchError, RequestError
from lorakeet.export.bundle import verify_bundle
from lorakeet.export.merged import MergeOrder, write_merged
from lorakeet.models.load import load_model


def build_base(folder, tokenizer_folder, *, tied):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build_adapter(base, folder, **settings):
    model, _ = load_model(base)
    attach(model, Lora(rank=4, alpha=8, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    write_adapter(model, folder, base=base)
    return folder


def order(base, adapter, **options):
    return MergeOrder(base=base, adapter_folder=adapter, **options)


@pytest.fixture(scope="session")
def base(tmp_path_factory, chat_tokenizer_folder):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("export") / "base"
    return build_base(folder, chat_tokenizer_folder, tied=False)


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory, chat_tokenizer_folder):
    folder = tmp_path_factory.mktemp("export") / "tied"
    return build_base(folder, chat_tokenizer_folder, tied=True)


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory):
    return build_adapter(base, tmp_path_factory.mktemp("export") / "adapter")


def test_a_merge_is_written_proven_and_loads_anywhere(base, adapter, tmp_path):
    out, proofs = tmp_path / "merged", tmp_path / "proofs"
    proof = write_merged(order(base, adapter), out, run_proofs=proofs)
    assert proof.passed and proof.dtype == "float32"
    assert proof.figures["max_relative_difference"] < 1e-4
    assert proof.figures["top1_agreement"] == 1 and proof.figures["same_greedy_text"]
    assert proof.figures["num_changed_tensors"] == 0 < proof.figures["num_tensors"]
    assert json.loads((proofs / "merge.json").read_text())["name"] == "merge"
    assert verify_bundle(out) == proof.hashes
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("a merged model", return_tensors="pt")["input_ids"]
    model, _ = load_model(base)
    plain = model(input_ids=ids).logits
    read_adapter(model, adapter)
    expected = model(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1, "the adapter changes nothing"


def flip_one_bit(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1
    path.write_bytes(data)


def forget_the_merge(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_the_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "damage",
    [
        flip_one_bit,
        lose_a_tensor,
        lose_the_tokenizer,
        pytest.param(forget_the_merge, marks=SLOW),
        pytest.param(cut_the_file, marks=SLOW),
    ],
)
def test_a_damaged_merge_is_refused_and_moved_aside(base, adapter, tmp_path, damage):
    out = tmp_path / "merged"
    with pytest.raises(MismatchError, match="not base \\+ adapter"):
        write_merged(order(base, adapter), out, run_proofs=tmp_path / "proofs", after_write=damage)
    assert not out.exists() and (tmp_path / "merged.failed" / "config.json").exists()
    proof = json.loads((tmp_path / "proofs" / "merge.json").read_text())
    assert not proof["passed"] and proof["problems"]


def test_bfloat16_is_held_to_its_own_stated_limits(base, adapter, tmp_path):
    proof = write_merged(order(base, adapter, dtype="bfloat16"), tmp_path / "out")
    assert proof.passed and not proof.tolerances["same_greedy_text"]
    assert proof.figures["max_logit_difference"] > 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("targets", [pytest.param("all-linear", marks=SLOW), ("q_proj", "lm_head")])
def test_tied_embeddings_survive_a_merge(tied_base, tmp_path, targets):
    build_adapter(tied_base, tmp_path / "adapter", targets=targets)
    proof = write_merged(order(tied_base, tmp_path / "adapter"), tmp_path / "out")
    assert proof.passed
    assert proof.figures.get("head_untied", False) == ("lm_head" in targets)


def test_an_existing_folder_and_an_unknown_dtype_are_refused(base, adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(RequestError, match="new folder"):
        write_merged(order(base, adapter), tmp_path / "full")
    with pytest.raises(RequestError, match="float32, bfloat16"):
        write_merged(order(base, adapter, dtype="int3"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_full_disk_is_told_in_bytes_and_leaves_nothing(base, adapter, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MachineError, match="1,000 are free"):
        write_merged(order(base, adapter), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
