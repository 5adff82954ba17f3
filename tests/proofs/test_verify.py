"""A proof passes on a sound run and fails, with the reason, when what it guards is broken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorakeet.adapters.manifest import seal
from lorakeet.api.proofs.adapter import verify_adapter
from lorakeet.api.proofs.cuts import UNPACKED, verify_accumulation, verify_packing
from lorakeet.api.proofs.data import verify_data
from lorakeet.api.proofs.merge import verify_merge
from lorakeet.api.proofs.resume import verify_resume
from lorakeet.api.training import train
from lorakeet.base.errors import FileFormatError
from lorakeet.base.run_folder import RunFolder, read_json
from lorakeet.cli.app import APP
from lorakeet.evaluate.report import write_report

torch.set_num_threads(1)


def write_rows(path, count=24):
    rows = [
        {"question": f"How many sails has boat {n}?", "answer": "sail " * (n % 7 + 1)}
        for n in range(count)
    ]
    rows += [rows[0], {"question": "no answer"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")


def make_recipe(folder, **train_settings):
    return {
        "base": "starter",
        "data": {"train": str(folder / "rows.jsonl"), "max_tokens": 128, "validation": 0.2},
        "method": {"rank": 2},
        "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3, **train_settings},
    }


@pytest.fixture
def run(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    train(make_recipe(tmp_path), tmp_path / "run")
    return tmp_path / "run"


def proof_of(run, name):
    return read_json(RunFolder(run).proofs / f"{name}.json")


def test_every_row_is_accounted_for_by_file_and_line(run):
    proof = verify_data(run)
    assert proof.passed, proof.problems
    figures = proof.figures
    assert figures["num_read"] == 27
    assert figures["num_dropped"] == 3
    assert figures["num_trained"] + figures["num_validation"] == 24
    written = proof_of(run, "data")
    assert written["passed"] and written["versions"]["torch"] and written["time"]


def test_a_row_that_vanished_from_the_list_is_named(run):
    dropped = RunFolder(run).dropped
    lines = dropped.read_text().splitlines(keepends=True)
    dropped.write_text("".join(lines[1:]))
    gone = json.loads(lines[0])
    proof = verify_data(run)
    assert not proof.passed and proof.figures["num_unaccounted_rows"] == 1
    assert any(f"line {gone['line']}" in problem for problem in proof.problems)


def test_a_changed_source_fails_the_proof_of_the_data(run):
    source = run.parent / "rows.jsonl"
    source.write_text(source.read_text().replace("boat 3", "boat x"))
    proof = verify_data(run)
    assert proof.figures["num_changed_sources"] == 1 and proof.figures["num_unaccounted_rows"] == 0
    assert any(str(source) in problem for problem in proof.problems)


def test_a_sound_adapter_answers_the_same_from_a_copy(run):
    proof = verify_adapter(run)
    assert proof.passed, proof.problems
    assert proof.figures["max_logit_difference"] == 0.0 < proof.figures["effect_on_logits"]
    assert proof_of(run, "adapter")["passed"]


def break_weights(folder):
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 64
    path.write_bytes(bytes(data))


def spoil_with_nan(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)
    (folder / "lorakeet.json").unlink()


def claim_another_base(folder):
    path = folder / "lorakeet.json"
    path.write_text(json.dumps(seal(read_json(path) | {"base_weights_sha256": "0" * 64})))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (break_weights, "SHA-256"),
        (spoil_with_nan, "NaN"),
        (claim_another_base, "other bytes"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    ],
)
def test_a_harmed_adapter_fails_with_the_reason(run, harm, reason):
    harm(run / "adapter")
    proof = verify_adapter(run)
    assert not proof.passed
    assert any(reason in problem for problem in proof.problems), proof.problems
    assert not proof_of(run, "adapter")["passed"]


def test_how_a_step_is_cut_changes_rounding_only(run):
    proof = verify_accumulation(run)
    assert proof.passed, proof.problems
    assert 0 < proof.figures["gradient_relative_difference"] < 1e-4
    assert proof.figures["num_samples"] == 8


def test_a_mean_of_means_is_found(run, monkeypatch):
    from lorakeet.train import step

    honest = step.StepRunner._accumulate

    def mean_of_means(self, batches, rows, num_targets):
        return [
            loss for batch, row in zip(batches, rows, strict=True)
            for loss in honest(self, [batch], [row], batch.num_targets * len(batches))
        ]  # fmt: skip

    monkeypatch.setattr(step.StepRunner, "_accumulate", mean_of_means)
    proof = verify_accumulation(run)
    assert not proof.passed and proof.figures["gradient_relative_difference"] > 1e-3


def test_packed_samples_teach_what_they_teach_alone(run):
    proof = verify_packing(run)
    assert proof.passed and not proof.notes, proof.problems
    assert 0 < proof.figures["gradient_relative_difference"] < 1e-4
    assert proof.figures["num_cuts"] == 5 and proof_of(run, "packing")["passed"]
    assert "packed end to end" in write_report(RunFolder(run)).read_text()


def test_documents_that_see_each_other_are_found(run, monkeypatch):
    from lorakeet.train import step

    honest = step.score_pack

    def leaky(model, ids, positions, mask, bounds):
        return honest(model, ids, positions, mask, (0, bounds[-1]))

    monkeypatch.setattr(step, "score_pack", leaky)
    proof = verify_packing(run)
    assert not proof.passed and proof.figures["gradient_relative_difference"] > 1e-3


def test_a_model_that_is_never_packed_is_compared_padded_and_says_so(run, monkeypatch):
    from lorakeet.models import packed

    monkeypatch.setattr(packed, "_answers_alike", lambda *_: False)
    proof = verify_packing(run)
    assert proof.passed and proof.notes == (UNPACKED,) and proof.figures["num_cuts"] == 2


def test_a_resumed_run_has_the_same_bytes_and_leaves_nothing_behind(run):
    before = sorted(path.name for path in run.iterdir())
    proof = verify_resume(run, steps=1)
    assert proof.passed, proof.problems
    assert proof.figures["num_files"] == 4
    assert sorted(p.name for p in run.iterdir()) == sorted([*before, "proofs"])


def test_a_resume_that_forgets_the_moments_is_found(run, monkeypatch):
    monkeypatch.setattr("lorakeet.train.loop.restore_moments", lambda *_: None)
    proof = verify_resume(run, steps=1)
    assert not proof.passed
    assert any("moments" in problem for problem in proof.problems)


def test_the_merge_is_proven_and_thrown_away(run):
    proof = verify_merge(run)
    assert proof.passed, proof.problems
    assert proof_of(run, "merge")["figures"]["num_changed_tensors"] == 0
    assert not [path for path in run.iterdir() if "verify" in path.name]


def test_the_commands_show_the_figures_and_exit_with_1_on_failure(run):
    commands = CliRunner()
    good = commands.invoke(APP, ["verify", "data", str(run)])
    assert good.exit_code == 0 and "num read" in good.output and "proved" in good.output
    break_weights(run / "adapter")
    bad = commands.invoke(APP, ["verify", "adapter", str(run), "--json"])
    assert bad.exit_code == 1 and json.loads(bad.stdout)["passed"] is False
    page = write_report(RunFolder(run)).read_text()
    assert "SHA-256 differs" in page and "every row of the sources" in page


@pytest.mark.parametrize("verify", [verify_data, verify_resume, verify_merge])
def test_a_folder_without_a_run_is_refused(verify, tmp_path):
    with pytest.raises(FileFormatError, match="no run folder"):
        verify(tmp_path)
