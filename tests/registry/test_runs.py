"""The registry repeats what the folders tell, now and after it was lost."""

import json

import pytest
from typer.testing import CliRunner

from lorakeet.api.describe import describe
from lorakeet.api.runs import compare_runs, find_run, list_runs, record, remove_run, scan_runs
from lorakeet.base.errors import FileFormatError, RequestError
from lorakeet.base.registry import VARIABLE, Registry, registry_beside
from lorakeet.base.run_folder import write_json
from lorakeet.base.run_lock import hold_run
from lorakeet.cli.app import APP
from tests.registry.folders import write_adapter_files, write_run


class Alarms(list):
    def __call__(self, kind, /, **fields):
        self.append((kind, fields))


@pytest.fixture(autouse=True)
def _no_other_registry(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def root(tmp_path):
    for name, options in (("law", {}), ("law-2", {"loss": 1.25, "seed": 7, "batch_size": 4}),
                          ("cut", {"state": "interrupted"}), ("bad", {"state": "failed"}),
                          ("killed", {"state": "running"})):  # fmt: skip
        folder = write_run(tmp_path / "runs" / name, **options)
        heard = Alarms()
        record(folder, heard)
        assert not heard
    return tmp_path / "runs"


def rows_of(root):
    return {entry.name: entry for entry in list_runs(root)}


def test_a_row_says_what_was_asked_what_came_of_it_and_from_which_bytes(root):
    law = rows_of(root)["law"]
    assert (law.state, law.kind, law.base, law.method, law.steps) == (
        "finished", "run", "starter", "lora r=16", 3,
    )  # fmt: skip
    assert law.scores == {"validation loss": 1.5, "validation perplexity": 3.0}
    assert law.hashes == {
        "base": "b" * 64, "data a.jsonl": "d" * 64, "adapter/adapter_model.safetensors": "a" * 64,
    }  # fmt: skip
    assert law.created <= law.finished and law.settings["train.batch_size"] == 16


def test_the_state_is_that_of_this_moment(root):
    states = {name: entry.state for name, entry in rows_of(root).items()}
    assert states == {"law": "finished", "law-2": "finished", "cut": "interrupted",
                      "bad": "failed", "killed": "stopped"}  # fmt: skip
    assert rows_of(root)["bad"].problem == "step 3: the loss is nan."
    with hold_run(root / "killed"):
        assert rows_of(root)["killed"].state == "running"


def test_evaluation_adds_scores(root):
    write_json(root / "law" / "evaluation.json", {
        "domain": {"base": {"accuracy": 0.1}, "tuned": {"accuracy": 0.9}},
        "perplexity": {"base": {"perplexity": 9.0}, "tuned": {"perplexity": 3.0}},
    })  # fmt: skip
    record(root / "law", Alarms())
    scores = rows_of(root)["law"].scores
    assert scores["domain tuned"] == 0.9 and scores["perplexity base"] == 9.0


def test_a_lost_or_damaged_registry_is_built_again_from_the_folders(root):
    before = rows_of(root)
    (root / "registry.sqlite").unlink()
    with pytest.raises(RequestError, match="runs scan"):
        list_runs(root)
    assert not scan_runs(root).problems and rows_of(root) == before
    (root / "registry.sqlite").write_bytes(b"no database" * 500)
    with pytest.raises(FileFormatError, match="runs scan"):
        list_runs(root)
    heard = Alarms()
    record(root / "law", heard)
    ((kind, fields),) = heard
    assert kind == "alarm" and fields["code"] == "registry" and "goes on" in fields["message"]
    scan_runs(root)
    assert rows_of(root) == before and (root / "registry.sqlite.damaged").is_file()


def test_a_scan_tells_of_damaged_folders_and_forgets_lost_ones(root):
    (root / "law-2" / "evaluation.json").write_text("{")
    (root / "cut").rename(root.parent / "elsewhere")
    found = scan_runs(root)
    assert len(found.problems) == 1 and "law-2" in found.problems[0]
    assert "cut" not in rows_of(root)


def test_registry_and_runs_can_move_together(root, tmp_path):
    moved = root.rename(tmp_path / "archive")
    assert rows_of(moved)["law"].folder == moved / "law"
    assert rows_of(moved)["law"].state == "finished"


def test_another_place_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "one" / "all.sqlite"))
    for name in ("a/x", "b/y"):
        record(write_run(tmp_path / name), Alarms())
    assert rows_of(tmp_path / "a").keys() == {"x", "y"}
    assert not (tmp_path / "a" / "registry.sqlite").exists()


def test_scratch_runs_in_hidden_folders_stay_off_the_record(tmp_path):
    record(write_run(tmp_path / ".verify" / "straight"), Alarms())
    assert not list(tmp_path.rglob("*.sqlite"))


def test_parents_are_named_by_folder_or_found_by_their_hash(root):
    write_adapter_files(root / "both", digest="c" * 64, parents=[
        {"folder": "runs/law/adapter", "weight": 0.5,
         "sha256": {"adapter_model.safetensors": "a" * 64}},
    ])  # fmt: skip
    write_json(root / "one" / "lorakeet.json", {
        "files": {"model.safetensors": {"sha256": "e" * 64, "bytes": 3}},
        "lineage": {"base": "starter", "adapter": {
            "files": {"adapter_model.safetensors": "c" * 64}}},
    })  # fmt: skip
    assert not scan_runs(root).problems
    both, one = find_run("both", root), find_run("one", root)
    assert both.kind == "adapter" and both.parents[0]["sha256"] == "a" * 64
    assert one.kind == "model" and one.parents[0]["folder"] == str(root / "both")
    write_run(root / "next", base=str(root / "one"))
    (parent,) = describe(root / "next").parents
    assert parent["folder"] == str(root / "one") and parent["relation"] == "trained on"


def test_a_comparison_shows_what_differs_and_all_scores(root):
    found = compare_runs(["law", str(root / "law-2")], root)
    assert found.settings == {"train.batch_size": (16, 4), "train.seed": (0, 7)}
    assert found.scores["validation loss"] == (1.5, 1.25) and not found.hashes
    with pytest.raises(RequestError, match="at least two"):
        compare_runs(["law"], root)


def test_a_name_that_is_missing_or_not_alone_is_told(root):
    with pytest.raises(RequestError, match="no such run.*law-2"):
        find_run("lww", root)
    registry_beside(root / "law").put(describe(write_run(root.parent / "other" / "law")))
    with pytest.raises(RequestError, match="2 entries have this name"):
        find_run("law", root)


def test_removing_takes_folder_and_row_and_never_a_running_run(root):
    with hold_run(root / "law"), pytest.raises(RequestError, match="is writing this run"):
        remove_run("law", root)
    assert (root / "law" / "resolved.yaml").is_file()
    remove_run("law", root)
    assert "law" not in rows_of(root) and "law-2" in rows_of(root)
    assert not [path for path in root.iterdir() if "law" in path.name and path.name != "law-2"]


def test_removing_never_takes_a_folder_that_is_no_run(root):
    for path in (root / "law").iterdir():
        if path.is_file():
            path.unlink()
    (root / "law" / "thesis.txt").write_text("years")
    with pytest.raises(RequestError, match="neither a run nor an adapter"):
        remove_run("law", root)
    assert (root / "law" / "thesis.txt").read_text() == "years"


def test_a_row_whose_folder_is_gone_says_so_and_can_be_removed(root):
    (root / "law").rename(root.parent / "elsewhere")
    assert rows_of(root)["law"].state == "gone"
    remove_run("law", root)
    assert "law" not in rows_of(root)


def test_a_registry_of_another_version_is_refused(root):
    import sqlite3

    with sqlite3.connect(root / "registry.sqlite") as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(FileFormatError, match="version 9"):
        Registry(root / "registry.sqlite").read()


def say(*words, code=0, answer=None):
    done = CliRunner().invoke(APP, ["runs", *map(str, words)], input=answer)
    assert done.exit_code == code, done.output
    return done.output


def test_the_commands_speak_to_people_and_machines(root):
    listed = say("list", "--root", root)
    assert "law-2" in listed and "stopped" in listed and "2.5" in listed
    assert len(json.loads(say("list", "--root", root, "--json"))) == 5
    shown = say("show", "law", "--root", root)
    assert "lora r=16" in shown and "aaaaaaaaaaaa" in shown
    assert json.loads(say("show", root / "bad", "--json"))["problem"].startswith("step 3")
    compared = say("compare", "law", "law-2", "--root", root)
    assert "train.seed" in compared and "1.25" in compared and "epochs" not in compared
    assert json.loads(say("compare", "law", "law-2", "--root", root, "--json"))["settings"]
    say("remove", "law", "--root", root, answer="n\n", code=1)
    assert (root / "law").is_dir()
    say("remove", "law", "--root", root, answer="y\n")
    say("remove", root / "law-2", "--yes")
    assert not (root / "law").exists() and not (root / "law-2").exists()
    assert len(json.loads(say("scan", root, "--json"))["entries"]) == 3
