"""Files of a run appear whole or not at all, and the diary survives a crash."""

import json
import os

import pytest

from lorakeet.base.errors import FileFormatError, LorakeetError, MachineError, RequestError
from lorakeet.base.events import EventLog, read_events
from lorakeet.base.run_folder import (
    RunFolder,
    read_json,
    remove_leftovers,
    sha256_folder,
    write_json,
    write_text,
)


def test_a_failed_write_leaves_the_older_file_and_no_scraps(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_text(path, "older")

    def refuse(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(MachineError, match="disk is full; this file needs 5 bytes"):
        write_text(path, "newer")
    assert path.read_text() == "older"
    assert [item.name for item in tmp_path.iterdir()] == ["plan.json"]


def test_json_round_trip_and_damage(tmp_path):
    path = tmp_path / "a" / "x.json"
    write_json(path, {"词": [1, 2.5, None]})
    assert read_json(path) == {"词": [1, 2.5, None]}
    path.write_text("{")
    with pytest.raises(FileFormatError, match="not JSON"):
        read_json(path)
    with pytest.raises(FileFormatError, match="no such file"):
        read_json(tmp_path / "absent.json")


def test_the_folder_hash_depends_on_names_and_bytes_only(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, names in ((one, ("a", "b")), (two, ("b", "a"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(f"content of {name}")
    assert sha256_folder(one) == sha256_folder(two)
    (two / "a").write_text("other")
    assert sha256_folder(one) != sha256_folder(two)


def test_a_half_written_last_event_is_passed_over_and_the_next_one_stands(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("step", step=1, loss=float("nan"), answers=(("q", "a"),))
    with log.path.open("a") as file:
        file.write('{"kind": "st')
    assert [event["kind"] for event in read_events(log.path)] == ["step"]
    EventLog(log.path).emit("checkpoint", step=2)
    events = read_events(log.path)
    assert [event["kind"] for event in events] == ["step", "checkpoint"]
    assert events[0]["loss"] is None
    assert all(json.dumps(event, allow_nan=False) for event in events)


def test_an_unknown_kind_of_event_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no kind of event"):
        EventLog(tmp_path / "events.jsonl").emit("stpe")


def test_every_error_has_its_exit_code():
    def below(cls):
        return {cls, *(leaf for child in cls.__subclasses__() for leaf in below(child))}

    codes = {cls.__name__: cls.exit_code for cls in below(LorakeetError)}
    assert codes["RecipeError"] == 2 and codes["RowError"] == 3
    assert codes["MachineError"] == 4 and codes["InterruptedRun"] == 130


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path):
    run = RunFolder(tmp_path)
    write_text(run.data / "report.json", "{}")
    write_text(run.path / ".keep", "")
    (run.path / ".adapter.12.tmp").mkdir()
    (run.path / ".adapter.12.old").mkdir()
    (run.data / ".report.json.12.tmp").write_text("{")
    remove_leftovers(run)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".keep", "data", "report.json"]
