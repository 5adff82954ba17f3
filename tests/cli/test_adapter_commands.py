"""``lorakeet adapters``: what each command says to people and to machines."""

import json

import pytest
from typer.testing import CliRunner

from lorakeet.adapters.attach import attach
from lorakeet.adapters.layer import Lora
from lorakeet.api.adapters import select_targets_of
from lorakeet.base.errors import FileFormatError, RequestError
from lorakeet.cli.app import APP
from lorakeet.models.load import load_model
from tests.adapters.test_combine import changes_of, make
from tests.families import build


def say(*words):
    done = CliRunner().invoke(APP, ["adapters", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    tables = [x for x in done.output.splitlines() if not x.startswith(("done", "error"))]
    assert all(len(line) <= 80 for line in tables), done.output
    return done.output


def read(*words):
    done = CliRunner().invoke(APP, ["adapters", *map(str, words), "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.output)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "law" / "adapter", 1, targets=("q_proj", "v_proj"))
    make(tmp_path / "prose", 2, targets=("q_proj",), rank_pattern={r".*\.0\..*": 2})
    return tmp_path


def test_list_finds_every_adapter_and_names_the_damaged(folder):
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    (folder / ".prose.1.tmp").mkdir()
    (folder / ".prose.1.tmp" / "adapter_config.json").write_text("{}")
    rows = {row["folder"]: row for row in read("list", folder)}
    assert rows.keys() == {"broken", "law/adapter", "prose"}
    assert rows["prose"]["ranks"] == [2, 4] and rows["law/adapter"]["targets"] == [
        "q_proj",
        "v_proj",
    ]
    assert "no weights" in rows["broken"]["problem"] and rows["prose"]["problem"] is None
    told = say("list", folder)
    assert "law/adapter" in told and "2 to 4" in told
    with pytest.raises(RequestError, match="no such folder"):
        say("list", folder / "nothing")


def test_show_gives_norms_hashes_and_parents(folder):
    shown = read("show", "prose")
    assert shown["is_verified"] and shown["lineage"]["data"] == "data-2"
    for module, change in changes_of(folder / "prose").items():
        layer = shown["layers"][module]
        assert layer["norm"] == pytest.approx(float(change.norm()))
        assert (layer["in"], layer["out"]) == (change.shape[1], change.shape[0])
    assert shown["num_parameters"] == 64 * (2 + 4)
    say("combine", "prose", "--out", "half", "--kind", "linear")
    told = say("show", "half")
    assert "right, by lorakeet.json" in told and "parent prose x 1" in told
    assert "0.self_attn.q_proj" in told and "kind linear" in told


def test_show_refuses_an_adapter_whose_bytes_have_changed(folder):
    path = folder / "prose" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FileFormatError, match="SHA-256 differs"):
        say("show", "prose")


def test_diff_gives_each_layer_and_the_whole(folder):
    found = read("diff", "law/adapter", "prose")
    assert found["layers"]["model.layers.0.self_attn.q_proj"]["ranks"] == [4, 2]
    assert 0 <= found["whole"]["inputs"]["phi"] <= 1
    told = say("diff", "law/adapter", "prose")
    assert "0.self_attn.v_proj" in told and "random ones share" in told


def test_combine_reads_weights_and_writes_the_sum(folder):
    told = say("combine", "law/adapter", "prose=-0.5", "--out", "both")
    assert "both holds the combination" in told
    one, other = changes_of(folder / "law" / "adapter"), changes_of(folder / "prose")
    name = "model.layers.1.self_attn.q_proj"
    assert (changes_of(folder / "both")[name] - (one[name] - 0.5 * other[name])).abs().max() < 1e-6
    layers = read("combine", "law/adapter=2", "prose=0.1", "--out", "near", "--kind", "svd",
                  "--rank", "3")  # fmt: skip
    assert layers[name]["rank"] == 3 and layers[name]["error"] > 0.01
    with pytest.raises(RequestError, match=r"much' is no number[\s\S]*prose is named twice"):
        say("combine", "law=much", "prose", "prose=2", "--out", "none")


def test_targets_counts_what_attach_would_train_and_names_near_words():
    model, _ = load_model("starter")
    for pattern in ("all-linear", r".*layers\.[01]\..*_proj", "q_proj"):
        report = attach(model, Lora(rank=3, targets=pattern), name=f"a{len(pattern)}")
        found = read("targets", "starter", "--pattern", pattern, "--rank", "3")
        assert found["parameters"] == report.trained_parameters
        assert [t["module"] for t in found["targets"]] == list(report.targets)
    told = say("targets", "starter", "--pattern", "q_proj", "--pattern", "down_proj")
    assert "model.layers.*.mlp.down_proj" in told and "modules" in told
    with pytest.raises(RequestError, match="Near names: .*q_proj"):
        say("targets", "starter", "--pattern", "qproj")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_targets_need_no_weights(family, tmp_path):
    model = build(family)
    model.config.save_pretrained(tmp_path)
    task = "classify" if family == "bert" else "chat"
    found = select_targets_of(str(tmp_path), Lora(rank=2), task=task)
    report = attach(model, Lora(rank=2))
    assert sum(each.parameters for each in found) == report.trained_parameters
