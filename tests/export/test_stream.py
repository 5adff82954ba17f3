"""A streamed merge gives the bits of the merge in memory, and holds one tensor at a time."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lorakeet.adapters.attach import adapter_parameters, attach, detach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.merge import merge
from lorakeet.base.errors import MismatchError, NumericsError, RequestError
from lorakeet.export.merged import MergeOrder, write_merged
from lorakeet.export.stream import write_stream
from lorakeet.export.stream_plan import plan_stream
from lorakeet.models.load import build_without_weights, load_model, read_tokenizer
from tests.families import build, some_ids

torch.set_num_threads(1)
CASES = {
    "llama": ("llama", {}),
    "head": ("llama", {"targets": ("lm_head", "embed_tokens")}),
    "saved": ("llama", {"modules_to_save": ("lm_head",), "targets": ("q_proj",)}),
    "tied": ("llama-tied", {}),
    "tied-embedding": ("llama-tied", {"targets": ("embed_tokens", "q_proj")}),
    "tied-saved": ("llama-tied", {"modules_to_save": ("embed_tokens",), "targets": ("v_proj",)}),
    "gpt2": ("gpt2", {"targets": ("c_attn", "c_fc", "wte"), "rslora": True}),
    "biases": ("gpt2", {"targets": ("c_attn", "c_fc"), "bias": "all"}),
    "some-biases": ("qwen2", {"bias": "lora_only", "layers": (1,)}),
    "qwen3": ("qwen3", {"rank_pattern": {"q_proj": 2}}),
    "falcon": ("falcon", {}),
}


def build_deep():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 96}
    config = LlamaConfig(**sizes, num_hidden_layers=12, vocab_size=96)
    return LlamaForCausalLM(config)


def make(tmp_path, family, settings, *, stored=torch.float32, scale=0.1, shard="20KB"):
    """A base in shards and an adapter on it."""
    model = build_deep() if family == "llama-deep" else build(family)
    model = model.to(stored)
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    attach(model, Lora(**{"rank": 4, "alpha": 8, **settings}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    write_adapter(model, tmp_path / "adapter", base="base")
    return type(detached(model))


def detached(model):
    detach(model)
    return model


def stream(tmp_path, dtype, *, max_shard_bytes=30_000):
    empty = build_without_weights(str(tmp_path / "base"))
    plan = plan_stream(empty, tmp_path / "base", tmp_path / "adapter", dtype)
    assert not plan.obstacles
    out = tmp_path / "out"
    out.mkdir()
    digests = write_stream(plan, out, max_shard_bytes=max_shard_bytes)
    return empty, out, digests


@pytest.mark.parametrize(
    "case,dtypes",
    [(case, "float32-float32") for case in CASES]
    + [("llama", "bfloat16-float16"), ("tied-saved", "float32-bfloat16")]
    + [("gpt2", "bfloat16-bfloat16")],
)
def test_the_bits_are_those_of_the_merge_in_memory(case, dtypes, tmp_path):
    family, settings = CASES[case]
    stored, wanted = (getattr(torch, name) for name in dtypes.split("-"))
    kind = make(tmp_path, family, settings, stored=stored)
    model = kind.from_pretrained(tmp_path / "base", dtype=torch.float32)
    read_adapter(model, tmp_path / "adapter")
    merge(model)
    detach(model)
    model.to(wanted).save_pretrained(tmp_path / "whole")
    empty, out, digests = stream(tmp_path, wanted)
    found = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == expected.keys() == digests.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert empty.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert empty.config.tie_word_embeddings == (case in ("tied", "falcon", "biases"))

    empty.config.save_pretrained(out)
    pair = [
        kind.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tmp_path / "whole", out)
    ]
    with torch.no_grad():
        answers = [model(input_ids=some_ids()).logits for model in pair]
    assert torch.equal(*answers)


def test_shards_keep_their_limit_and_the_index_names_each_tensor_once(tmp_path):
    make(tmp_path, "llama", {})
    _, out, digests = stream(tmp_path, torch.float32, max_shard_bytes=15_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == digests.keys()
    for name in files:
        tensors = load_file(out / name)
        assert {index["weight_map"][key] for key in tensors} == {name}
        assert sum(t.numel() * 4 for t in tensors.values()) <= 15_000 or len(tensors) == 1


class PeakBytes(TorchDispatchMode):
    """Bytes of all tensors alive at once, but for files that are mapped and not read."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        if storage.filename is not None or storage in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.now -= size


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_no_more_than_one_tensor_at_its_work_is_held(stored, tmp_path):
    make(tmp_path, "llama-deep", {"targets": "all-linear"}, stored=stored)
    empty = build_without_weights(str(tmp_path / "base"))
    plan = plan_stream(empty, tmp_path / "base", tmp_path / "adapter", stored)
    (tmp_path / "out").mkdir()
    with PeakBytes() as held:
        write_stream(plan, tmp_path / "out", max_shard_bytes=10**9)
    largest = max(torch.Size(piece.shape).numel() for piece in plan.pieces)
    # In float32 the base and the change, 8 bytes an element; from 16 bits also the base as
    # it is stored; and the factors.
    assert 4 * largest < held.peak < 11 * largest < plan.num_bytes / 4, (held.peak, largest)


def test_a_weight_that_leaves_the_range_of_its_dtype_is_refused(tmp_path):
    make(tmp_path, "llama", {}, scale=3000.0)
    with pytest.raises(NumericsError, match=r"proj.weight: .*torch.float16"):
        stream(tmp_path, torch.float16)


def test_files_that_name_their_tensors_otherwise_are_not_streamed(tmp_path):
    make(tmp_path, "gpt-neox", {"targets": ("query_key_value",)})
    empty = build_without_weights(str(tmp_path / "base"))
    plan = plan_stream(empty, tmp_path / "base", tmp_path / "adapter", torch.float32)
    assert plan.obstacles == ("lm_head.weight is in no file of the base",)


def test_a_streamed_merge_of_the_starter_is_proven_with_and_without_answers(tmp_path):
    model_folder = tmp_path / "adapter"
    model, _ = load_model("starter")
    attach(model, Lora(rank=2, targets=("q_proj",)))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.02)
    write_adapter(model, model_folder, base="starter")
    detach(model)
    order = MergeOrder(base="starter", adapter_folder=model_folder)
    answers = write_merged(order, tmp_path / "one")
    order = replace(order, proof="tensors")
    tensors = write_merged(order, tmp_path / "two")
    assert answers.passed and tensors.passed and "top1_agreement" in answers.figures
    number = len(list(model.state_dict())) - 1  # less the head, which is tied
    assert tensors.figures == {"num_tensors": number, "num_changed_tensors": 0}
    assert {n: h for n, h in answers.hashes.items() if n.endswith("safetensors")} == {
        n: h for n, h in tensors.hashes.items() if n.endswith("safetensors")
    }
    read_tokenizer(str(tmp_path / "two"))

    def flip_one_bit(folder):
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-3000] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    with pytest.raises(MismatchError, match="1 tensors on disk"):
        write_merged(order, tmp_path / "x", after_write=flip_one_bit)
    with pytest.raises(RequestError, match="answers, tensors"):
        write_merged(replace(order, proof="none"), tmp_path / "y")
