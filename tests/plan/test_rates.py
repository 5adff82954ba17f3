"""``plan --learning-rate``: the same figures twice, a table, a picture, and advice on the rank."""

import io
import json

import pytest
from rich.console import Console

from lorakeet.api.rates import try_rates
from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.plan.advice import advise, advise_rank
from lorakeet.plan.model_facts import read_model_facts
from lorakeet.plan.table import render_rates
from lorakeet.plan.trained import count_trained
from tests.plan.configs import write_config


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"a short letter number {n} about the weather"} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_from_dict({
        "base": "starter", "task": "text", "data": {"train": str(path), "validation": 0},
        "train": {"early_stopping": None, "epochs": 1, "batch_size": 4, "learning_rate": 1e-3},
        "method": {"rank": 4, "alpha": 8},
    })  # fmt: skip


def test_a_rate_is_recommended_with_a_table_and_a_picture(recipe, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "rates.png"
    found = try_rates(recipe, picture=picture)
    assert found.picture == str(picture) and picture.read_bytes().startswith(b"\x89PNG")
    losses = {result["rate"]: result["loss"] for result in found.results}
    assert found.recommended == min(losses, key=losses.get) and found.asked in losses
    assert losses[found.recommended] < found.first_loss
    console = Console(width=80, file=io.StringIO())
    console.print(render_rates(found))
    text = console.file.getvalue()
    assert all(f"{rate:.2e}" in text for rate in losses) and "rank 4 holds about" in text
    assert json.loads(json.dumps(found.to_dict()))["recommended"] == found.recommended
    again = try_rates(recipe)
    assert again.picture is None and again.results == found.results


def facts_of(tmp_path):
    write_config(tmp_path, {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000,
    })  # fmt: skip
    return read_model_facts(tmp_path)


def advice_on(tmp_path, **sections):
    recipe = recipe_from_dict({"base": "x", "data": {"train": "a"}, **sections})
    facts = facts_of(tmp_path)
    counted = count_trained(facts, recipe.method, is_classifier=False)
    return recipe, counted, advise(recipe, facts, counted)


def test_the_rank_that_is_advised_holds_the_tokens_and_one_less_does_not(tmp_path):
    recipe, counted, _ = advice_on(tmp_path, method={"rank": 2})
    bits_of_a_rank = 2 * counted.adapter_parameters // 2
    for tokens, rank in ((bits_of_a_rank * 5, 5), (bits_of_a_rank * 5 + 1, 6), (1, 1)):
        said = advise_rank(recipe, counted, tokens)
        assert f"rank {rank} " in said.replace("Rank", "rank").split("bits", 1)[1]
        assert ("would do" in said) is (rank <= 2)
    assert (
        count_trained(
            facts_of(tmp_path), MethodSettings(rank=1), is_classifier=False
        ).adapter_parameters
        * 2
        == bits_of_a_rank
    )


def test_common_guidance_that_is_outdated_is_told_with_its_source(tmp_path):
    assert advice_on(tmp_path)[2] == []
    low = advice_on(tmp_path, train={"learning_rate": 1e-5})[2]
    assert "ten times" in low[0] and "LoRA Without Regret" in low[0]
    many = advice_on(tmp_path, train={"epochs": 10, "early_stopping": None})[2]
    assert "arXiv:2305.16264" in many[0]
    assert advice_on(tmp_path, train={"epochs": 10})[2] == []
    large = advice_on(tmp_path, train={"batch_size": 128})[2]
    assert "LoRA Without Regret" in large[0]
