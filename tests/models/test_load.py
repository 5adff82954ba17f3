"""A base model loads whole, or the reason is said; pickles are never opened."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as t

from lorakeet.base.errors import FileFormatError, LorakeetError, RequestError
from lorakeet.models.load import EMBEDDED_STARTER, load_model, read_tokenizer, resolve_base

torch.set_num_threads(1)


@pytest.fixture
def copy(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_real_model_loads_in_float32_and_evaluation_mode(tiny_llama):
    model, tokenizer = load_model(str(tiny_llama))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert sum(p.numel() for p in model.parameters()) == 260_032
    assert tokenizer.is_fast


def test_a_bfloat16_checkpoint_widens_without_loss(tiny_llama, tmp_path):
    narrow = t.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path)
    read_tokenizer(str(tiny_llama)).save_pretrained(tmp_path)
    wide, _ = load_model(str(tmp_path))
    for (name, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.float(), b), name


def damage_by_half(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "truncated": (damage_by_half, "damaged"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"hello"), "damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "object"),
    "config is cut": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "unknown": (lambda f: change_config(f, model_type="zzz"), "architecture"),
    "other shape": (lambda f: change_config(f, intermediate_size=100), "shape"),
    "more layers": (lambda f: change_config(f, num_hidden_layers=9), "36 weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("task", ["chat", "classify"])
def test_a_damaged_folder_is_refused_with_its_reason(damage, task, copy):
    change, words = DAMAGES[damage]
    change(copy)
    with pytest.raises(FileFormatError, match=words if task == "chat" else None):
        load_model(str(copy), task=task, label_names=("a", "b"))


def test_a_classifier_has_a_head_that_two_loads_agree_on(tiny_llama):
    state = torch.get_rng_state()
    first, second = (
        load_model(str(tiny_llama), task="classify", label_names=("no", "yes", "maybe"))[0]
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.score.weight, second.score.weight)
    assert first.score.weight.shape[0] == 3 and first.config.id2label[2] == "maybe"


@pytest.mark.parametrize(
    "base", ["./nowhere", "/no/where", "three/part/name", "has space", "owner/has space"]
)
def test_a_base_that_is_neither_folder_nor_name_is_a_wrong_request(base):
    with pytest.raises(RequestError, match="no such folder"):
        resolve_base(base)


def test_an_unreachable_hub_is_said_in_one_sentence():
    code = (
        "from lorakeet.models.load import resolve_base\n"
        "from lorakeet.base.errors import MachineError\n"
        "try: resolve_base('nobody/nothing-here')\n"
        "except MachineError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"},
    )  # fmt: skip
    assert "the Hub cannot be reached" in done.stdout and "starter" in done.stdout


def test_modelscope_without_its_client_says_how_to_get_it(monkeypatch):
    for name in ("modelscope", "modelscope_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LorakeetError, match="pip install"):
        resolve_base("ms://owner/name")


def test_the_starter_ships_with_the_package():
    assert resolve_base("starter") == EMBEDDED_STARTER
