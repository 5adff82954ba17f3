"""The table in a terminal of 80 columns."""

import io

import pytest
from rich.console import Console

from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.units import GIB
from lorakeet.plan.choose import DataFacts, make_plan
from lorakeet.plan.hardware import Gpu, Hardware
from lorakeet.plan.memory import KINDS
from lorakeet.plan.table import render_plan
from tests.plan.configs import write_config

LARGE = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80,
         "intermediate_size": 28672, "vocab_size": 128256, "num_attention_heads": 64,
         "num_key_value_heads": 8}  # fmt: skip
CONFIGS = {"small": {"model_type": "bloom"}, "usual": {"model_type": "gpt2"}, "large": LARGE}


def render(folder, config, *, free_gib, gpu=None, **recipe):
    write_config(folder, config)
    free = int(free_gib * GIB)
    hardware = Hardware(
        cores=128, memory_bytes=free, free_memory_bytes=free, disk_free_bytes=1,
        gpus=(Gpu(name=gpu, memory_bytes=free),) if gpu else (),
    )  # fmt: skip
    content = {"base": "b", "data": {"train": "a.jsonl"}, **recipe}
    data = DataFacts(num_run_tokens=10**9)
    plan = make_plan(recipe_from_dict(content), folder, hardware, data=data)
    console = Console(width=80, file=io.StringIO())
    console.print(render_plan(plan))
    return plan, console.file.getvalue()


@pytest.mark.parametrize("gpu", [None, "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("free_gib", [0.01, 2, 4000])
def test_every_number_is_whole_at_80_columns(config, gpu, free_gib, tmp_path):
    _, text = render(tmp_path, CONFIGS[config], free_gib=free_gib, gpu=gpu)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    table = [line.split() for line in text.splitlines() if line.strip().startswith(KINDS)]
    by_kind = {cells[0]: cells for cells in table if not cells[0].endswith(":")}
    assert list(by_kind) == list(KINDS)
    assert {len(cells) for cells in by_kind.values()} == {13}  # 5 values with a unit, 3 without


def test_every_reason_every_advice_and_the_choice_are_told(tmp_path):
    plan, text = render(tmp_path, CONFIGS["usual"], free_gib=0.1, method={"rank": 64})
    flat = " ".join(text.split())
    for told in (*plan.advice, *plan.remedies, *(f"{m.kind}: {m.why}" for m in plan.methods)):
        assert told in flat
    assert flat.endswith("chosen: none, see the advice")
    assert plan.remedies


def test_what_would_fit_but_cannot_be_trained_stands_in_brackets(tmp_path):
    wrong = {"targets": ["no_such"]}
    plan, text = render(tmp_path, CONFIGS["usual"], free_gib=4000, method=wrong)
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines() if "%" in line}
    assert rows == {"full": "yes", "lora": "(yes)", "lora-8bit": "(yes)", "qlora": "(yes)"}
    assert text.rstrip().endswith("chosen: none, see the advice")
