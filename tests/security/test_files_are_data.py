"""Adapters, models, recipes, rows and templates are data: nothing in them runs or leads outside."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from lorakeet.adapters.attach import attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.manifest import seal
from lorakeet.base.errors import FileFormatError, LorakeetError, RequestError, RowError
from lorakeet.base.recipe_file import read_recipe
from lorakeet.base.records import Turn
from lorakeet.data.render import render
from lorakeet.infer.prompts import encode_prompt, find_end_of_turn_id
from lorakeet.models.load import load_model, read_tokenizer, resolve_base
from lorakeet.serve.adapter_store import (
    NAME_PATTERN,
    AdapterStore,
    AdapterVersion,
    find_folder_under,
)
from tests.train.runs import make_model

TURNS = [Turn(role="user", content="What is 2 + 2?"), Turn(role="assistant", content="4")]
# Each tries to reach Python's inside, a file or a shell; {place} is a file that must not appear.
TEMPLATES = (
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ cycler.__init__.__globals__.os.system('touch {place}') }}}}",
    "{{{{ lipsum.__globals__['os'].popen('touch {place}').read() }}}}",
    "{{{{ self.__init__.__globals__['__builtins__']['open']('{place}', 'w') }}}}",
    "{{{{ messages.__class__.__base__.__subclasses__()[0] }}}}",
    "{{{{ (messages|attr('__class__')).__mro__ }}}}",
    "{{{{ raise_exception.__globals__['sys'].modules['os'].system('touch {place}') }}}}",
    "{{{{ strftime_now.__globals__['datetime'].sys.modules['os'].system('touch {place}') }}}}",
    "{{{{ messages.append({{'role': 'system', 'content': 'x'}}) }}}}",
    "{{{{ messages[0].update({{'content': 'x'}}) }}}}",
    "{{% include '{place}' %}}",
    "{{% import 'os' as os %}}{{{{ os.system('touch {place}') }}}}",
    "{{% extends '/etc/passwd' %}}",
    "{{{{ range(1000000000) | list }}}}",
    "{{{{ '%s'.format.__globals__ }}}}",
    "{{{{ '{{0.__class__.__mro__}}'.format(messages) }}}}",
    "{{{{ raise_exception('no') }}}}",
    "{{% for m in messages %}}{{{{ m.content.missing.deeper }}}}{{% endfor %}}",
    "{{% macro f() %}}{{{{ f() }}}}{{% endmacro %}}{{{{ f() }}}}",
    "{{{{ 1 / 0 }}}}",
)


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer("starter")


@pytest.mark.parametrize("number", range(len(TEMPLATES)))
def test_a_hostile_template_is_refused_and_reaches_nothing(number, tokenizer, tmp_path):
    place = tmp_path / "reached"
    former = tokenizer.chat_template
    tokenizer.chat_template = TEMPLATES[number].format(place=place)
    try:
        for use, nothing in ((render, ""), (lambda turns, t: encode_prompt(t, turns), [])):
            try:
                assert use(TURNS, tokenizer) == nothing
            except (RowError, RequestError) as error:
                assert "template refuses" in str(error)
        assert find_end_of_turn_id(tokenizer) is None
    finally:
        tokenizer.chat_template = former
    assert not place.exists()


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% for x in range(9) %}a{% endfor %}",
                                  "{{ cycler.__init__.__globals__ }}"])  # fmt: skip
def test_what_a_row_says_is_text_and_no_template(text, tokenizer):
    assert text in render([Turn(role="user", content=text), TURNS[1]], tokenizer)


HOSTILE_PARTS = [
    *"../ . ~ etc passwd law / // %2e%2e C: ..\\ \\ file: é $HOME `id` ; con | ..".split(),
    "", " ", "\0", "\n", "a" * 70,
]  # fmt: skip


def hostile_name(number):
    draw = random.Random(number)
    joined = draw.choice(["/", "\\", "", "//"]).join(
        draw.choices(HOSTILE_PARTS, k=draw.randint(1, 5))
    )
    return draw.choice([joined, "/" + joined, "../" + joined, joined + "\0", "-" + joined])


class OpenWatch:
    """Remembers every file that this process opens while it is on."""

    def __init__(self):
        self.is_on, self.opened = False, []
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if self.is_on and event in ("open", "os.listdir", "os.scandir") and arguments[0]:
            self.opened.append(str(arguments[0]))


def test_300_hostile_names_and_paths_open_nothing_outside_the_root(tmp_path):
    root = tmp_path / "root"
    (root / "law").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    store, watch, published = AdapterStore(("base",)), OpenWatch(), 0
    version = AdapterVersion(digest="a" * 64, folder=root / "law")
    for number in range(300):
        name = hostile_name(number)
        try:
            store.publish(name, version)
            published += 1
            assert NAME_PATTERN.fullmatch(name) and Path(name).name == name
        except RequestError:
            pass
        watch.is_on = True
        try:
            found = find_folder_under(root, name)
            assert found.is_relative_to(root.resolve())
        except RequestError:
            pass
        finally:
            watch.is_on = False
    assert published < 30
    assert all(Path(path).resolve().is_relative_to(root.resolve()) for path in watch.opened)


@pytest.fixture
def adapter(tmp_path):
    model = make_model()
    attach(model, Lora(rank=2, targets=("c_attn",)))
    return write_adapter(model, tmp_path / "adapter", base="none")


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_manifest_cannot_name_files_outside_its_folder(adapter, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    rewrite(adapter / "lorakeet.json", lambda c: seal(
        c | {"files": c["files"] | {"../secret": "0" * 64, str(secret): "0" * 64}}))  # fmt: skip
    watch = OpenWatch()
    watch.is_on = True
    with pytest.raises(FileFormatError, match="secret is not the file"):
        read_adapter(make_model(), adapter)
    watch.is_on = False
    assert str(secret) not in watch.opened and watch.opened


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickled_adapter_is_never_opened(name, adapter):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (adapter / "exploded",)

    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), adapter / name)
    with pytest.raises(FileFormatError, match="pickle.*never opened"):
        read_adapter(make_model(), adapter)
    assert not (adapter / "exploded").exists()


def copy_starter(folder):
    shutil.copytree(resolve_base("starter"), folder)
    return folder


def test_a_pickled_base_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    folder = copy_starter(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match="pickle"):
        load_model(str(folder))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", ["known", "unknown"])
def test_code_beside_a_base_is_never_run(kind, tmp_path):
    """A base may bring its own modeling code; it is passed over, or the base is refused."""
    folder, place = copy_starter(tmp_path / "base"), tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(place)!r}).touch()\nclass Odd: pass\n"
    for name in ("modeling_odd", "configuration_odd", "tokenization_odd"):
        (folder / f"{name}.py").write_text(code)
    auto = {"AutoConfig": "configuration_odd.Odd", "AutoModelForCausalLM": "modeling_odd.Odd"}
    change = {"auto_map": auto} | ({"model_type": "odd"} if kind == "unknown" else {})
    rewrite(folder / "config.json", lambda c: c | change)
    auto = {"AutoTokenizer": ["tokenization_odd.Odd", None]}
    rewrite(folder / "tokenizer_config.json", lambda c: c | {"auto_map": auto})
    try:
        load_model(str(folder))
        assert kind == "known"
    except LorakeetError:
        pass
    assert not place.exists()


@pytest.mark.parametrize("line", [
    "base: !!python/object/apply:os.system ['touch {place}']",
    "base: !!python/object/new:pathlib.Path ['{place}']",
    "base: starter\ndata: !!python/name:os.system",
])  # fmt: skip
def test_a_recipe_cannot_call_python(line, tmp_path):
    recipe, place = tmp_path / "recipe.yaml", tmp_path / "reached"
    recipe.write_text(line.format(place=place) + "\n")
    with pytest.raises(LorakeetError):
        read_recipe(recipe)
    assert not place.exists()
