"""Runs that are killed at any moment and go on; each attempt is a forked child.

A fork costs no imports.  The seeds of the moments are fixed; where they fall follows from
this machine's speed.  The tests use it with Lorakeet, ``benchmarks.faults`` with others too.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

import torch

from lorakeet.base.run_folder import sha256_file
from lorakeet.models.load import read_tokenizer

STEPS, ROWS_PER_STEP, MAX_KILLS = 6, 4, 3
GOOD, BAD, STUCK = "same bytes", "other bytes", "could not resume"


def write_work(work: Path) -> None:
    """A tiny Llama with random weights and the starter's tokenizer, and rows of questions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = read_tokenizer("starter")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    rows = [{"question": f"How many sails has boat {n}?", "answer": "sail " * (n % 5 + 1)}
            for n in range(24)]  # fmt: skip
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(work: Path) -> dict:
    """A run of 6 steps over that work which saves after each of them."""
    return {
        "base": str(work / "base"),
        "data": {"train": str(work / "rows.jsonl"), "validation": 0.2},
        "method": {"rank": 2, "dropout": 0.1},
        "train": {"max_steps": STEPS, "epochs": 9, "batch_size": ROWS_PER_STEP,
                  "learning_rate": 1e-3, "checkpoint_every_steps": 1, "evaluate_every_steps": 5},
    }  # fmt: skip


def in_child(work: Callable[[], int | None]) -> int:
    """Forks a quiet child that does the work and ends with its answer, 0 or 1 for an error."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        torch.set_num_threads(1)  # torch renews its pool after a fork, not for two threads at once
        code = work() or 0
    finally:
        os._exit(code)


def wait_for(number: int) -> int:
    """The exit code of a child; minus the signal's number when one has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


class KillTrials:
    """An undisturbed run, its digest and its duration, and killed ones beside it.

    Args:
        train: begins or goes on with a run in a folder.
        result_of: the file of a run whose bytes are compared.
    """

    def __init__(
        self, folder: Path, train: Callable[[Path], None], result_of: Callable[[Path], Path]
    ) -> None:
        self.folder, self.train, self.result_of = folder, train, result_of
        folder.mkdir(exist_ok=True)
        train(folder / "warm-up")  # the imports, once for all children
        started_s = time.monotonic()
        if wait_for(self.start(folder / "whole")):
            raise RuntimeError(f"{folder}: the undisturbed run has failed")
        self.duration_s = time.monotonic() - started_s
        self.digest = sha256_file(result_of(folder / "whole"))

    def start(self, run: Path) -> int:
        """A child that trains, or goes on with what is there."""
        return in_child(lambda: self.train(run))

    def run_trial(self, trial: int, run: Path) -> str:
        """Kills one to three times, then lets the run end; GOOD, BAD or STUCK."""
        draw = random.Random(trial)
        for _ in range(draw.randint(1, MAX_KILLS)):
            child = self.start(run)
            time.sleep(draw.uniform(0, 1.1 * self.duration_s))
            os.kill(child, signal.SIGKILL)  # one that has ended waits to be collected
            wait_for(child)
        if wait_for(self.start(run)):
            return STUCK
        return GOOD if sha256_file(self.result_of(run)) == self.digest else BAD
