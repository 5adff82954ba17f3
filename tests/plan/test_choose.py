"""What fits and what is chosen, on machines and with recipes of every kind."""

import json
import re

import pytest

from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.units import GIB, to_readable_bytes
from lorakeet.plan.case import HEADROOM_FRACTION
from lorakeet.plan.choose import DataFacts, make_plan
from lorakeet.plan.hardware import Gpu, Hardware
from lorakeet.plan.memory import KINDS, PROCESS_BYTES, MemoryCase, estimate_memory
from lorakeet.plan.remedies import SETTING
from lorakeet.plan.trained import count_trained
from tests.plan.configs import write_config

GPT2 = {"model_type": "gpt2"}
FULL, LORA = {"kind": "full"}, {"kind": "lora"}


def machine(free_gib, gpu=None):
    free = int(free_gib * GIB)
    gpus = (Gpu(name=gpu, memory_bytes=free),) if gpu else ()
    return Hardware(cores=2, memory_bytes=free, free_memory_bytes=free, disk_free_bytes=GIB,
                    gpus=gpus)  # fmt: skip


@pytest.fixture
def plan_for(tmp_path):
    """A plan of GPT-2 on a machine with so much memory."""

    def make(free_gib=64.0, *, gpu="Other", known=None, config=GPT2, **recipe):
        write_config(tmp_path, config)
        content = {"base": "b", "data": {"train": "a.jsonl"}, **recipe}
        return make_plan(recipe_from_dict(content), tmp_path, machine(free_gib, gpu), data=known)

    return make


def rows(plan):
    return {method.kind: method for method in plan.methods}


@pytest.mark.parametrize("method", [FULL, LORA])
def test_the_recipes_own_method_stands_when_it_fits(plan_for, method):
    plan = plan_for(method=method)
    assert plan.chosen == method["kind"]
    assert plan.remedies == ()


def test_lora_is_chosen_where_full_training_does_not_fit(plan_for):
    wide = rows(plan_for(method=FULL))
    between = (wide["full"].memory.total + wide["lora"].memory.total) / 2 / HEADROOM_FRACTION
    plan = plan_for(between / GIB, method=FULL)
    assert plan.chosen == "lora"
    assert plan.remedies[-1] == "method.kind: lora fits as the rest stands."


@pytest.mark.parametrize(("least", "next_one"), [("qlora", "lora-8bit"), ("lora-8bit", "lora")])
def test_fewer_bits_are_chosen_only_where_more_do_not_fit(plan_for, least, next_one):
    wide = rows(plan_for())
    between = (wide[least].memory.total + wide[next_one].memory.total) / 2 / HEADROOM_FRACTION
    plan = plan_for(between / GIB)
    assert rows(plan)[least].fits and not rows(plan)[next_one].fits
    assert plan.chosen == least
    assert plan.remedies[-1] == f"{SETTING[least]} fits as the rest stands."
    assert all(method.is_trainable for method in plan.methods)


@pytest.mark.parametrize(
    ("bits", "kind"), [("nf4", "qlora"), ("fp4", "qlora"), ("int8", "lora-8bit")]
)
def test_a_recipe_of_few_bits_is_planned_as_it_is(plan_for, bits, kind):
    plan = plan_for(quantization={"kind": bits})
    assert plan.chosen == kind
    coarse = plan_for(quantization={"kind": bits, "block_size": 64, "double": False})
    more = rows(coarse)["qlora"].memory.weights - rows(plan)["qlora"].memory.weights
    assert more == pytest.approx((0.5625 - 0.51587) * plan.facts.linear_parameters, rel=1e-3)


@pytest.mark.parametrize("free_gib", [0.01, 0.5, 1, 1.5, 2, 3, 5, 100])
def test_fitting_is_nine_tenths_of_the_free_memory_and_only_then(plan_for, free_gib):
    plan = plan_for(free_gib)
    for method in plan.methods:
        assert method.fits is (method.memory.total <= int(0.9 * plan.hardware.usable_bytes))
        assert ("is free" in method.why) is not method.fits
    assert (plan.chosen is None) is not rows(plan)["qlora"].fits


OFFER = re.compile(
    r"(\S+|quantization.kind: nf4) fits with (train.\S+)(?: and (data.\S+))? of (\d+)"
)


@pytest.mark.parametrize("free_gib", [1.1, 1.3, 1.6, 2.0, 2.4])
def test_fewer_tokens_are_offered_only_where_they_fit(plan_for, free_gib):
    def fits(kind, tokens):
        plan = plan_for(free_gib, gpu=None, data={"train": "a.jsonl", "max_tokens": tokens},
                        train={"micro_batch_tokens": tokens})  # fmt: skip
        return rows(plan)[kind].fits

    plan = plan_for(free_gib, gpu=None)
    offers = [found for text in plan.remedies if (found := OFFER.search(text))]
    assert offers or plan.chosen == "lora"
    for offer in offers:
        kind, tokens = "qlora" if "nf4" in offer[0] else "lora", int(offer[4])
        assert fits(kind, tokens) and not fits(kind, 2 * tokens)
        assert (offer[3] == "data.max_tokens") == (tokens < 1024)


def test_where_the_libraries_alone_do_not_fit_no_smaller_base_is_named(plan_for):
    assert "libraries alone take 600.00 MiB" in " ".join(plan_for(0.5).remedies)
    assert "fits a base of about" in " ".join(plan_for(0.75).remedies)


def test_no_remedy_names_more_memory_than_what_is_asked_for_takes(plan_for):
    """Layers in few bits bring a compiler, so a small base needs least as it is."""
    tiny = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64,
            "n_positions": 64}  # fmt: skip
    process = PROCESS_BYTES[False]
    alone = f"libraries alone take {to_readable_bytes(process)}"
    for share in (0.6, 1.05, 1.12, 1.15, 1.2):
        plan = plan_for(share * process / GIB, gpu=None, config=tiny)
        said, need = " ".join(plan.remedies), rows(plan)["lora"].memory
        room = HEADROOM_FRACTION * share * process
        assert (alone in said) is (room <= need.process)
        assert "nf4" not in said and "int8" not in said
        assert (plan.chosen == "lora") is (need.total <= room)


@pytest.mark.parametrize(("train", "max_tokens", "expected"), [
    ({}, 512, 1024), ({}, 4096, 4096), ({"micro_batch_tokens": 512}, 256, 512),
    ({"micro_batch_tokens": 512}, 8192, 8192), ({"micro_batch_tokens": 9000}, 64, 9000),
])  # fmt: skip
def test_a_micro_batch_is_the_limit_or_one_longer_sample(plan_for, train, max_tokens, expected):
    data = {"train": "a.jsonl", "max_tokens": max_tokens}
    plan = plan_for(train=train, data=data)
    counted = count_trained(plan.facts, MethodSettings(), is_classifier=False)
    case = MemoryCase(counted=counted, micro_batch_tokens=expected,
                      is_gpu=bool(plan.hardware.gpus))  # fmt: skip
    found = rows(plan)["lora"].memory.activations
    assert found == estimate_memory(plan.facts, "lora", case).activations


def test_targets_that_match_nothing_are_told_and_nothing_is_chosen(plan_for):
    plan = plan_for(method={"targets": ["q_proj"]})
    assert (plan.chosen, plan.remedies) == (None, ())
    assert rows(plan)["lora"].trained_parameters == 0
    assert "cannot be trained" in rows(plan)["lora"].why
    assert "q_proj matches no module" in plan.advice[0]
    assert "c_attn, c_fc, c_proj" in plan.advice[0]


@pytest.mark.parametrize("recipe", [
    {"method": {"modules_to_save": ["no_such"]}},
    {"method": {"targets": "no_such"}, "task": "classify", "train": {"early_stopping": None}},
])  # fmt: skip
def test_what_attaching_would_refuse_is_not_chosen_even_if_something_is_trained(plan_for, recipe):
    plan = plan_for(**recipe)
    assert plan.chosen is None
    assert rows(plan)["lora"].trained_parameters > 0
    assert "no_such matches no module" in plan.advice[0]


def test_names_do_not_matter_to_full_training(plan_for):
    plan = plan_for(method={"kind": "full", "targets": "no_such"})
    assert plan.chosen == "full"


def test_advice_speaks_of_the_settings_that_evidence_is_against(plan_for):
    assert plan_for().advice == ()
    method = {"targets": ["c_attn"], "rank": 64}
    said = plan_for(method=method, train={"batch_size": 64}).advice
    assert [text.split()[0] for text in said] == ["targets:", "rank", "batch_size:"]
    assert plan_for(method={"targets": ["c_attn", "c_proj", "c_fc"]}).advice == ()
    assert "learning_rate" in plan_for(method=FULL).advice[0]
    assert plan_for(method=FULL, train={"learning_rate": 1e-5}).advice == ()


def test_a_classifier_trains_its_new_head(plan_for):
    plan = plan_for(task="classify", data={"train": "a.jsonl", "labels": ["a", "b", "c"]},
                    train={"early_stopping": None})  # fmt: skip
    chat = plan_for()
    head = rows(plan)["lora"].trained_parameters - rows(chat)["lora"].trained_parameters
    assert head == 3 * 768


def test_the_data_say_how_many_classes_there_are(plan_for):
    plan = plan_for(task="classify", train={"early_stopping": None}, known=DataFacts(num_labels=7))
    assert plan.facts.vocabulary == 7


def test_the_run_time_is_the_tokens_over_the_speed(plan_for):
    known = DataFacts(num_run_tokens=1_000_000)
    plan = plan_for(80, gpu="NVIDIA H200", known=known)
    for method in plan.methods:
        assert method.run_s == pytest.approx(1_000_000 / method.tokens_per_s)
    assert "about" in rows(plan)["lora"].why
    assert {(m.tokens_per_s, m.run_s) for m in plan_for(known=known).methods} == {(None, None)}
    assert rows(plan_for(gpu="NVIDIA H200"))["lora"].run_s is None


def test_the_json_holds_every_row_and_survives_a_round_trip(plan_for):
    content = plan_for(method=LORA).to_dict()
    assert json.loads(json.dumps(content)) == content
    assert [row["kind"] for row in content["methods"]] == list(KINDS)
    lora = content["methods"][1]
    assert set(lora) == {"kind", "trained_parameters", "trained_fraction", "bytes", "fits",
                         "is_trainable", "tokens_per_s", "run_s", "why", "cost",
                         "cost_per_million_tokens"}  # fmt: skip
    assert lora["bytes"]["total"] == sum(v for k, v in lora["bytes"].items() if k != "total")
    assert content["chosen"] == "lora"
    assert content["model"]["parameters"] == 124_439_808
