"""100 damaged adapter files: each is refused with its reason, and the model stays as it was."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.adapters.attach import adapter_names, adapter_parameters, attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.base.errors import FileFormatError
from tests.families import build

torch.set_num_threads(1)
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "lorakeet.json"
SETTINGS = [
    ("llama", Lora(rank=4, targets=("q_proj", "v_proj", "down_proj"))),
    ("gpt2", Lora(rank=3, targets=("c_attn", "wte"), dora=True)),
    ("bert", Lora(rank=2, targets=("query", "dense"), exclude=("classifier",),
                  modules_to_save=("classifier",))),
    ("llama", Lora(rank=2, targets=("o_proj", "up_proj"), start="pissa", rslora=True)),
]  # fmt: skip
OTHER_BASE = {"llama": "gpt2", "gpt2": "bert", "bert": "llama"}


def edit(folder, change):
    """Writes the tensors again after a change; without a manifest, as another tool would."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / WEIGHTS)
    (folder / MANIFEST).unlink()


def renamed(folder, rng):
    def change(tensors):
        key = rng.choice(sorted(tensors))
        tensors[key.replace(".weight", ".wieght") + rng.choice(["", "x", ".default"])] = (
            tensors.pop(key)
        )

    edit(folder, change)
    return "missing: .*unexpected: |does not fit"


def missing(folder, rng):
    def change(tensors):
        for key in rng.sample(sorted(tensors), rng.randint(1, 3)):
            del tensors[key]

    edit(folder, change)
    return "missing: "


def extra(folder, rng):
    def change(tensors):
        tensors[f"base_model.model.other.{rng.randint(0, 9)}.lora_A.weight"] = torch.ones(2, 2)

    edit(folder, change)
    return "unexpected: "


def wrong_rank(folder, rng):
    config = json.loads((folder / CONFIG).read_text())
    config["r"] += rng.randint(1, 5)
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / MANIFEST).unlink()
    return "wrong shape: "


def wrong_shape(folder, rng):
    def change(tensors):
        key = rng.choice([k for k in sorted(tensors) if "lora_" in k])
        tensors[key] = tensors[key][1:]

    edit(folder, change)
    return "wrong shape: "


def not_finite(folder, rng):
    value = rng.choice([float("nan"), float("inf"), float("-inf")])

    def change(tensors):
        flat = tensors[rng.choice([k for k in sorted(tensors) if "lora_" in k])].view(-1)
        flat[rng.randrange(len(flat))] = value

    edit(folder, change)
    return "NaN or infinity: "


def truncated(folder, rng):
    file = folder / rng.choice([WEIGHTS, CONFIG])
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])
    if rng.random() < 0.5:
        (folder / MANIFEST).unlink()
    return "not a whole safetensors file|JSON|SHA-256"


def flipped(folder, rng):
    file = folder / rng.choice([WEIGHTS, CONFIG])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return "SHA-256|JSON|UTF-8|peft_type|cannot be used"


def wrong_base(folder, rng):
    return "does not fit"


def unknown_option(folder, rng):
    config = json.loads((folder / CONFIG).read_text())
    key, value = rng.choice([
        ("peft_type", "LOHA"), ("use_qalora", True), ("init_lora_weights", "olora"), ("r", "four"),
        ("lora_alpha", 0), ("lora_dropout", 1.5), ("target_modules", ["nowhere"]), ("r", None),
    ])  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config | {key: value}))
    (folder / MANIFEST).unlink()
    return "cannot be used here|wrong or missing value|no module of this model|alpha"


KINDS = (renamed, missing, extra, wrong_rank, wrong_shape, not_finite, truncated, flipped,
         wrong_base, unknown_option)  # fmt: skip


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_adapter_is_refused_with_its_reason(kind, number, tmp_path, tally):
    add = tally("bad adapters refused with their reason", 1)
    rng = random.Random(f"{kind.__name__}-{number}")
    family, settings = SETTINGS[number % len(SETTINGS)]
    source = build(family)
    attach(source, settings)
    with torch.no_grad():
        for parameter in adapter_parameters(source).values():
            parameter.add_(0.1)
    folder = write_adapter(source, tmp_path / "a", base="none")
    words = kind(folder, rng)
    model = build(OTHER_BASE[family] if kind is wrong_base else family)
    modules = dict(model.named_modules())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FileFormatError, match=words) as caught:
        read_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert dict(model.named_modules()) == modules and not adapter_names(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    add()
