"""An adapter in several files with an index, as transformers writes large ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.settings import Lora
from lorakeet.adapters.stored import read_stored
from lorakeet.adapters.weights import INDEX, WEIGHTS
from lorakeet.base.errors import FileFormatError
from tests.families import build, some_ids


@pytest.fixture
def shards(tmp_path):
    """A model with an adapter, and the adapter's folder in two files."""
    model = build("llama")
    attach(model, Lora(rank=2))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.05)
    write_adapter(model, tmp_path, base="x")
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "lorakeet.json").unlink()
    names = ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"]
    places = {key: names[number % 2] for number, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in tensors if places[key] == name}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return model, tmp_path, names


def test_shards_are_read_as_one_adapter(shards):
    model, folder, names = shards
    again = build("llama")
    read_adapter(again, folder)
    with torch.no_grad():
        wanted, found = (each(input_ids=some_ids()).logits for each in (model, again))
    assert torch.equal(wanted, found)
    stored = read_stored(folder)
    assert len(stored.layers) == len(adapter_parameters(model)) // 2
    assert set(names) < stored.digests.keys()


def test_a_missing_shard_and_an_index_of_other_tensors_are_refused(shards):
    _, folder, names = shards
    content = json.loads((folder / INDEX).read_text())
    first = next(iter(content["weight_map"]))
    other = {**content["weight_map"], f"{first}.more": names[0]}
    (folder / INDEX).write_text(json.dumps({"weight_map": other}))
    with pytest.raises(FileFormatError, match=r"differ in 1 tensors.*\.more"):
        read_adapter(build("llama"), folder)
    (folder / names[1]).unlink()
    with pytest.raises(FileFormatError, match="names adapter_model-00002.*no such file"):
        read_adapter(build("llama"), folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(FileFormatError, match="no weight_map"):
        read_adapter(build("llama"), folder)
