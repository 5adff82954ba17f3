"""What a user meets: commands, their exit codes, and messages that say what to do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROWS = [
    {"question": f"How many sails has boat {n}?", "answer": f"{n % 7} sails"} for n in range(40)
]


def lorakeet(*words, cwd=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "lorakeet", *map(str, words)], cwd=cwd, capture_output=True,
        text=True, timeout=240, env={**os.environ, "COLUMNS": "200"}, **options,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "recipe.yaml").write_text(
        "base: starter\ndata: {train: rows.jsonl, max_tokens: 128, validation: 0.2}\n"
        "method: {rank: 4}\ntrain: {epochs: 3, batch_size: 4, checkpoint_every_steps: 2}\n"
    )
    return tmp_path


def test_help_lists_every_verb_and_names_no_torch():
    done = lorakeet("--help")
    assert done.returncode == 0
    for verb in ("quickstart", "new", "doctor", "plan", "data", "train", "resume", "eval",
                 "report", "merge", "serve", "chat"):  # fmt: skip
        assert verb in done.stdout
    assert lorakeet("--version").stdout.startswith("lorakeet ")


def test_new_writes_a_recipe_that_plan_reads(tmp_path):
    done = lorakeet("new", "mine.yaml", "--data", "rows.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert lorakeet("new", "mine.yaml", cwd=tmp_path).returncode == 2
    planned = lorakeet("plan", "mine.yaml", "--json", cwd=tmp_path)
    plan = json.loads(planned.stdout)
    assert [m["kind"] for m in plan["methods"]] == ["full", "lora", "lora-8bit", "qlora"]
    assert plan["chosen"] == "lora" and plan["model"]["parameters"] > 1e6
    for method in plan["methods"]:
        parts = {k: v for k, v in method["bytes"].items() if k != "total"}
        assert sum(parts.values()) == method["bytes"]["total"]
    assert "chosen: lora" in lorakeet("plan", "mine.yaml", cwd=tmp_path).stdout


def test_doctor_tells_what_there_is():
    found = json.loads(lorakeet("doctor", "--json").stdout)
    assert {"python", "torch", "free memory", "free disk"} <= {item["name"] for item in found}


def test_data_check_and_show(folder):
    report = json.loads(lorakeet("data", "check", "rows.jsonl", "--json", cwd=folder).stdout)
    assert report["num_samples"] == 40
    shown = lorakeet("data", "show", "rows.jsonl", "--count", "1", cwd=folder)
    assert "⟦0 sails<|im_end|>⟧" in shown.stdout, shown.stdout + shown.stderr


def test_train_eval_merge_and_report(folder):
    done = lorakeet("train", "recipe.yaml", "--run", "run", "--set", "train.max_steps=6", "--json",
                    cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 6 and "perplexity" in result["metrics"]
    for name in ("recipe.yaml", "resolved.yaml", "plan.json", "events.jsonl",
                 "data/report.json", "data/dropped.jsonl", "adapter/adapter_config.json",
                 "adapter/adapter_model.safetensors", "adapter/lorakeet.json"):  # fmt: skip
        assert (folder / "run" / name).is_file(), name
    again = lorakeet("train", "recipe.yaml", "--run", "run", cwd=folder)
    assert again.returncode == 2 and "already holds a run" in again.stderr
    scored = lorakeet("eval", "run", "--json", cwd=folder)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["perplexity"]["tuned"]["num_targets"] > 0
    assert (folder / "run" / "report.html").stat().st_size > 5000
    merged = lorakeet("merge", "run", "--out", "merged", "--json", cwd=folder)
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["passed"] is True
    assert lorakeet("merge", "run", "--out", "merged", cwd=folder).returncode == 2


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(folder):
    settings = ["--set", "train.epochs=12", "--set", "train.early_stopping=null"]
    whole = lorakeet("train", "recipe.yaml", "--run", "whole", *settings, cwd=folder)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakeet", "train", "recipe.yaml", "--run", "cut", *settings],
        cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    events = folder / "cut" / "events.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (
        events.exists() and '"step", "step": 4' in events.read_text()
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "lorakeet resume" in told
    resumed = lorakeet("resume", "cut", cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    pair = [folder / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert pair[0].read_bytes() == pair[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "absent.yaml", "--run", "r"], 2, "there is no such recipe"),
        (
            ["train", "recipe.yaml", "--run", "r", "--set", "method.rnak=3"],
            2,
            "Did you mean 'rank'",
        ),
        (["train", "recipe.yaml", "--run", "r", "--set", "base=./nowhere"], 2, "no such folder"),
        (["train", "recipe.yaml", "--run", "r", "--set", "data.train=gone.jsonl"], 3, "gone.jsonl"),
        (["train", "recipe.yaml", "--run", "r", "--set", "data.max_tokens=8"], 3, "too-long"),
        (["train", "recipe.yaml", "--run", "r", "--set", "method.targets=[q_porj]"], 2, "q_proj"),
        (["resume", "nothing"], 3, "no run folder"),
        (["eval", "nothing"], 3, "no run folder"),
        (["merge", "nothing", "--out", "x"], 3, "no run folder"),
        (["serve", "--base", "starter", "--adapter", "x"], 2, "NAME=FOLDER"),
        (["data", "check", "gone.jsonl"], 3, "gone.jsonl"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_bad_input_has_one_clear_message_and_its_exit_code(folder, words, code, message):
    done = lorakeet(*words, cwd=folder)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_files_are_told_apart(folder):
    (folder / "empty.jsonl").write_text("")
    (folder / "bad.pdf").write_bytes(b"%PDF-1.4 not really")
    (folder / "bytes.jsonl").write_bytes(
        b'{"question": "a", "answer": "b"}\n{"question": "\xff\xfe\n'
    )
    for name in ("empty.jsonl", "bad.pdf"):
        done = lorakeet("data", "check", name, cwd=folder)
        assert done.returncode == 3 and name in done.stderr and "Traceback" not in done.stderr
    report = json.loads(lorakeet("data", "check", "bytes.jsonl", "--json", cwd=folder).stdout)
    assert report["num_samples"] == 1 and report["num_dropped"] == 1


def test_a_port_in_use_is_told(folder):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = lorakeet("serve", "--base", "starter", "--port", port)
    assert done.returncode == 4 and str(port) in done.stderr, done.stderr


def test_the_embedded_starter_is_small_and_whole():
    folder = Path(__import__("lorakeet").__file__).parent / "embedded" / "starter"
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    assert "held-out" in (folder / "README.md").read_text().lower()
