"""An adapter is taken on the base that it was trained on, and on another only when asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorakeet.adapters.attach import attach
from lorakeet.adapters.files import write_adapter
from lorakeet.adapters.settings import Lora
from lorakeet.base.errors import DataError, RequestError
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.export.merged import MergeOrder, write_merged
from lorakeet.models import base_hash
from lorakeet.models.base_hash import check_adapter, hash_base
from lorakeet.models.load import load_model
from lorakeet.serve.engine import Engine, EngineLimits
from tests.models.test_quantized import settings, write_base

torch.set_num_threads(1)
FULL = QuantizationSettings()


def make(folder, **lineage):
    """A base, and an adapter of it that says so."""
    write_base(folder / "base", "llama")
    model, _ = load_model(str(folder / "base"))
    attach(model, Lora(rank=2, alpha=4))
    lineage = {"base_weights_sha256": hash_base(folder / "base"), **lineage}
    write_adapter(model, folder / "a", base="base", lineage=lineage)
    return str(folder / "base"), folder / "a"


def test_a_readme_beside_the_weights_makes_no_other_base(tmp_path):
    base, adapter = make(tmp_path)
    copy = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    (copy / "README.md").write_text("words")
    check_adapter(adapter, base=str(copy), held=FULL)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        other = Path(shutil.copytree(base, tmp_path / name))
        content = (other / name).read_bytes()
        changed = content + b"\n" if name.endswith("json") else content[:-1] + b"\x01"
        (other / name).write_bytes(changed)
        with pytest.raises(DataError, match="trained on base.*other weights.*--other-base"):
            check_adapter(adapter, base=str(other), held=FULL)
    check_adapter(adapter, base=None, held=FULL)


def test_merging_and_serving_refuse_another_base_unless_it_is_asked_for(tmp_path):
    _, adapter = make(tmp_path, base_weights_sha256="0" * 64)
    base = str(tmp_path / "base")
    with pytest.raises(DataError, match="other-base"):
        Engine(base, {"a": adapter})
    engine = Engine(base, limits=EngineLimits())
    try:
        with pytest.raises(DataError, match="other-base"):
            engine.load_adapter("a", adapter)
    finally:
        engine.close()
    Engine(base, {"a": adapter}, limits=EngineLimits(other_base=True)).close()
    order = MergeOrder(base=base, adapter_folder=adapter, proof="tensors")
    with pytest.raises(DataError, match="other-base"):
        write_merged(order, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    asked = MergeOrder(base=base, adapter_folder=adapter, proof="tensors", other_base=True)
    assert write_merged(asked, tmp_path / "merged").passed


def test_an_adapter_that_repairs_few_bits_is_taken_in_those_bits_only(tmp_path):
    form = {"quantization": {"kind": "nf4"}, "start": "loftq"}
    base, adapter = make(tmp_path, **form)
    check_adapter(adapter, base=base, held=settings(cache="none"))
    for held in (FULL, settings("int8"), settings(block_size=128)):
        with pytest.raises(RequestError, match="LoftQ.*--into dequantised"):
            check_adapter(adapter, base=base, held=held)
    order = MergeOrder(base=base, adapter_folder=adapter, trained_on=settings(), proof="tensors")
    with pytest.raises(RequestError, match="LoftQ"):
        write_merged(order, tmp_path / "merged")


def test_the_digest_of_a_large_file_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    base, _ = make(tmp_path)
    monkeypatch.setattr(base_hash, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    first = hash_base(Path(base))
    memory = tmp_path / "home" / base_hash.MEMORY
    known = json.loads(memory.read_text())
    assert len(known) == 3 and hash_base(Path(base)) == first
    memory.write_text(json.dumps({k: [*v[:2], "f" * 64] for k, v in known.items()}))
    assert hash_base(Path(base)) != first  # the memory is used
    memory.write_text("{damaged")
    assert hash_base(Path(base)) == first
    (Path(base) / "config.json").write_text("{}")
    assert hash_base(Path(base)) != first
