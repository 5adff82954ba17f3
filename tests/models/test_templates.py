"""Chat templates from the recipe: for bases that bring none, and in the sandbox."""

import json

import pytest

from lorakeet.api.evaluation import load_tuned
from lorakeet.api.resolve import read_resolved
from lorakeet.api.training import train
from lorakeet.base.errors import DataError, RequestError
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.records import Turn
from lorakeet.base.run_folder import RunFolder
from lorakeet.data.render import find_trained_spans
from lorakeet.models.load import read_tokenizer
from lorakeet.models.templates import TEMPLATES, adopt_template, set_template
from tests.killed_runs import recipe_of, write_work

TURNS = [Turn(role="user", content="How many?"), Turn(role="assistant", content="Two.")]


@pytest.fixture
def tokenizer():
    found = read_tokenizer("starter")
    found.chat_template = None
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_built_in_template_trains_the_answer_and_its_end(name, tokenizer):
    set_template(tokenizer, name)
    text, ((start, stop),) = find_trained_spans(TURNS, tokenizer)
    assert text[start:stop] == "Two." + tokenizer.eos_token and "How many?" in text[:start]


def test_a_template_for_a_base_that_has_one_is_refused():
    with pytest.raises(RequestError, match="has a chat template of its own"):
        set_template(read_tokenizer("starter"), "plain")


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        (None, RequestError, "neither a file nor a built-in template. Built in are plain, alpaca"),
        ("{% for m in messages %}", DataError, "cannot be rendered"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", DataError, "cannot be rendered"),
        ("{{ messages.append(1) }}", DataError, "cannot be rendered"),
    ],
)
def test_what_is_no_template_or_reaches_out_is_told(text, error, told, tokenizer, tmp_path):
    place = tmp_path / "chat.jinja"
    if text is not None:
        place.write_text(text)
    with pytest.raises(error, match=told):
        set_template(tokenizer, str(place))


def test_two_adapters_with_different_templates_are_not_served_by_one(tokenizer, tmp_path):
    for name, template in TEMPLATES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat_template.jinja").write_text(template)
    adopt_template(tokenizer, tmp_path / "plain")
    adopt_template(tokenizer, tmp_path / "plain")
    with pytest.raises(RequestError, match="another chat template than .*plain"):
        adopt_template(tokenizer, tmp_path / "alpaca")


def test_a_run_records_the_template_and_its_adapter_carries_it(tmp_path, tokenizer):
    write_work(tmp_path)
    for place in (tmp_path / "base").glob("chat_template*"):
        place.unlink()
    settings = tmp_path / "base" / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content.pop("chat_template", None)
    settings.write_text(json.dumps(content))
    recipe = recipe_of(tmp_path)
    recipe["train"]["max_steps"] = 1
    with pytest.raises(DataError, match="no chat template"):
        train(recipe, tmp_path / "without")
    recipe["data"]["chat_template"] = "plain"
    run = RunFolder(train(recipe, tmp_path / "run").folder)
    assert len(read_resolved(run)["hashes"]["data"]["chat_template"]) >= 16
    adopt_template(tokenizer, run.adapter)
    assert tokenizer.chat_template == TEMPLATES["plain"]
    _, tuned, _ = load_tuned(run, recipe_from_dict(recipe))
    assert tuned.chat_template == TEMPLATES["plain"]
