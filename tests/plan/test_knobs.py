"""What a knob is said to save is what the plan of the changed recipe needs less."""

import pytest

from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.units import GIB
from lorakeet.plan.choose import make_plan
from lorakeet.plan.hardware import Gpu, Hardware
from lorakeet.plan.knobs import MIN_SAVED_BYTES
from lorakeet.plan.memory import kind_of
from tests.plan.configs import write_config

RECIPES = {
    "lora": {},
    "full": {"method": {"kind": "full"}},
    "int8": {"quantization": {"kind": "int8"}},
    "nf4, lean": {"quantization": {"kind": "nf4"}, "train": {"optimizer": "adamw-8bit"}},
    "long rows": {"data": {"train": "a.jsonl", "max_tokens": 4096}},
    "adalora": {"method": {"rank": 12, "adalora": {"target_rank": 8}}},
}


def plan_of(folder, content, *, has_gpu):
    gpus = (Gpu(name="Other", memory_bytes=80 * GIB),) if has_gpu else ()
    machine = Hardware(cores=2, memory_bytes=80 * GIB, free_memory_bytes=80 * GIB,
                       disk_free_bytes=GIB, gpus=gpus)  # fmt: skip
    write_config(folder, {"model_type": "qwen2", "num_hidden_layers": 4, "hidden_size": 896,
                          "num_attention_heads": 14, "num_key_value_heads": 2,
                          "intermediate_size": 4864})  # fmt: skip
    recipe = recipe_from_dict({"base": "b", "data": {"train": "a.jsonl"}, **content})
    made = make_plan(recipe, folder, machine)
    asked = kind_of(recipe)
    return made, next(m.memory.total for m in made.methods if m.kind == asked)


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("name", list(RECIPES))
def test_a_knob_saves_what_the_changed_recipe_needs_less(name, has_gpu, tmp_path):
    content = RECIPES[name]
    made, now = plan_of(tmp_path, content, has_gpu=has_gpu)
    saved = [knob.saved_bytes for knob in made.knobs]
    assert saved == sorted(saved, reverse=True)
    assert min(saved) >= MIN_SAVED_BYTES
    for knob in made.knobs:
        settings, value = knob.setting.split(": ")
        changed = {"data": {"train": "a.jsonl"}, **content}
        for setting in settings.split(" and "):
            section, key = setting.split(".")
            number = int(value) if value.isdigit() else value
            changed[section] = {**changed.get(section, {}), key: number}
        assert now - plan_of(tmp_path, changed, has_gpu=has_gpu)[1] == knob.saved_bytes


def test_every_kind_of_knob_is_told(tmp_path):
    short = {"data": {"train": "a.jsonl", "max_tokens": 256}}
    knobs = plan_of(tmp_path, short, has_gpu=False)[0].knobs
    assert {knob.setting.split(":")[0] for knob in knobs} == {
        "train.micro_batch_tokens", "quantization.kind", "method.rank", "train.optimizer",
        "data.validation",
    }  # fmt: skip
