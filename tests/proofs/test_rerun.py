"""The same recipe, data and versions give the same bytes; whatever differs is named."""

import pytest
import torch
from typer.testing import CliRunner

from lorakeet.api.rerun import find_other_versions, rerun
from lorakeet.api.resolve import read_resolved
from lorakeet.api.training import resume, train
from lorakeet.base.errors import DataError, FileFormatError, RequestError
from lorakeet.base.recipe_file import to_yaml
from lorakeet.base.run_folder import RunFolder, read_json
from lorakeet.cli.app import APP
from tests.proofs.test_verify import make_recipe, write_rows

torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    train(make_recipe(tmp_path), tmp_path / "run")
    return tmp_path / "run"


def test_a_rerun_gives_the_same_bytes(run, tmp_path, tally):
    add = tally("reruns of a recipe with the same bytes", 1)
    torch.manual_seed(17)
    proof = rerun(run, tmp_path / "again")
    assert proof.passed and proof.figures["num_files"] == 1 and not proof.notes
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert read_json(RunFolder(tmp_path / "again").proofs / "rerun.json")["passed"]
    add()


def test_changed_data_is_refused_by_name_and_trained_only_by_force(run, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(source.read_text().replace("boat 3", "boat x"))
    with pytest.raises(DataError, match=r"(?s)rows\.jsonl.*--force"):
        rerun(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    heard = []
    proof = rerun(run, tmp_path / "again", force=True, emit=lambda k, /, **f: heard.append((k, f)))
    assert heard[0][0] == "alarm" and heard[0][1]["code"] == "other-data"
    assert not proof.passed and "rows.jsonl" in proof.notes[0]


def test_other_versions_are_named_and_do_not_stop_it(run, tmp_path):
    folder = RunFolder(run)
    resolved = read_resolved(folder)
    resolved["versions"]["torch"] = "1.0"
    resolved["machine"]["threads"] = 96
    folder.resolved.write_text(to_yaml(resolved))
    notes = find_other_versions(read_resolved(folder))
    assert len(notes) == 2 and "torch was 1.0" in notes[0] and "threads was 96" in notes[1]
    proof = rerun(run, tmp_path / "again")
    assert proof.passed and proof.notes == notes


def test_a_resume_on_changed_data_is_told(run, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(source.read_text().replace("boat 3", "boat x"))
    heard = []
    resume(run, emit=lambda k, /, **f: heard.append((k, f)))
    told = [f["message"] for k, f in heard if k == "alarm" and f["code"] == "other-data"]
    assert len(told) == 1 and str(source) in told[0]


def test_the_command_says_what_was_compared(run, tmp_path):
    done = CliRunner().invoke(APP, ["rerun", str(run), "--into", str(tmp_path / "again")])
    assert done.exit_code == 0 and "bit for bit" in done.output


def test_what_cannot_be_rerun_is_refused(run, tmp_path):
    with pytest.raises(RequestError, match="already holds a run"):
        rerun(run, run)
    with pytest.raises(FileFormatError, match="no run folder"):
        rerun(tmp_path / "none", tmp_path / "again")
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileFormatError, match="no weights"):
        rerun(run, tmp_path / "again")
