"""A base with code of its own: refused without the flag, and run with it for one command."""

import json

import pytest
from typer.testing import CliRunner

from lorakeet.api.planning import plan
from lorakeet.base.errors import MachineError, RecipeError, RequestError
from lorakeet.base.events import read_events
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.run_folder import RunFolder, read_json, sha256_file
from lorakeet.cli.app import APP
from lorakeet.models.load import load_model
from lorakeet.models.remote_code import find_remote_code, is_remote_code_trusted
from tests.killed_runs import recipe_of, write_work

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path({mark!r}).write_text("it ran")

class SailorConfig(LlamaConfig):
    model_type = "sailor"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_sailor import SailorConfig

class SailorForCausalLM(LlamaForCausalLM):
    config_class = SailorConfig
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The tiny Llama as an architecture of its own, and a recipe over it."""
    for place in ("dynamic_module_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{place}.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "child"))
    write_work(tmp_path)
    base = tmp_path / "base"
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "sailor", "architectures": ["SailorForCausalLM"], "auto_map": {
        "AutoConfig": "configuration_sailor.SailorConfig",
        "AutoModelForCausalLM": "modeling_sailor.SailorForCausalLM"}}  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    code = CONFIGURATION.format(mark=str(tmp_path / "mark"))
    (base / "configuration_sailor.py").write_text(code)
    (base / "modeling_sailor.py").write_text(MODELING)
    recipe = recipe_of(tmp_path)
    recipe["train"] |= {"max_steps": 2}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def test_a_base_with_its_own_code_is_refused_and_nothing_of_it_runs(work):
    with pytest.raises(RequestError, match=r"own \(configuration_sailor.*--trust-remote-code"):
        load_model(str(work / "base"))
    assert not (work / "mark").exists()


def test_with_the_flag_it_trains_and_the_events_name_the_files(work):
    run = RunFolder(work / "run")
    order = ["train", str(work / "recipe.yaml"), "--run", str(run.path)]
    done = CliRunner().invoke(APP, [*order, "--trust-remote-code"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "the base's own code runs: configuration_sailor.py, modeling_sailor.py" in done.output
    assert (work / "mark").read_text() == "it ran"
    planned = read_json(run.plan)
    assert "sailor is not known" in planned["trial"]["why"] and planned["measured"]["num_steps"]
    (told,) = [event for event in read_events(run.events) if event["kind"] == "remote_code"]
    assert told["files"] == find_remote_code(work / "base")
    assert told["files"]["modeling_sailor.py"] == sha256_file(work / "base" / "modeling_sailor.py")
    assert not is_remote_code_trusted()  # it held for that command alone
    out = work / "merged"
    merge = ["merge", str(run.path), "--out", str(out), "--trust-remote-code"]
    done = CliRunner().invoke(APP, merge, catch_exceptions=False)
    assert done.exit_code == 0 and out.is_dir(), done.output


def test_a_plan_runs_none_of_it_and_says_so_and_trial_steps_need_the_flag(work):
    order, recipe = ["plan", str(work / "recipe.yaml")], str(work / "recipe.yaml")
    done = CliRunner().invoke(APP, [*order, "--json"], catch_exceptions=False)
    (told,) = [text for text in json.loads(done.output)["advice"] if "code of its own" in text]
    assert "configuration_sailor.SailorConfig" in told and "--trust-remote-code" in told
    with pytest.raises(MachineError, match="trial steps failed.*--trust-remote-code"):
        plan(recipe, measure=True)
    assert not (work / "mark").exists()


@pytest.mark.parametrize("place", ["top", "train"])
def test_a_recipe_cannot_say_it(place):
    content = {"base": "x", "data": {"train": "rows.jsonl"}, "train": {}}
    (content if place == "top" else content["train"])["trust_remote_code"] = True
    with pytest.raises(RecipeError, match="says --trust-remote-code to the command"):
        recipe_from_dict(content)
