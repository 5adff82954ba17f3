"""The same faults for Lorakeet and for Trainer + PEFT, in the same run, on the same machine.

    python -m benchmarks.faults [--kills 6] [--nans 9] [--adapters 20] [--write]

kills      a run of 6 steps that saves after each is killed (SIGKILL) one to three times at random
           moments, resumed from what lies on the disk, and must end with the undisturbed bytes
NaN        one number of the loss, a gradient or a weight becomes NaN at one step; it must be
           caught in that step, and nothing that is not finite may lie on the disk
adapters   damaged adapter folders (``tests/adapters/test_mutations.py``) must be refused

Both train LoRA r = 2 on the same tiny Llama with random weights and the same tokens; each is
killed at the same shares of its own duration.  The seeds are fixed, the moments follow from them
and from this machine's speed.  Every attempt is a forked child, so it costs no imports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

import torch
from safetensors.torch import load_file
from tests.adapters.test_mutations import KINDS, OTHER_BASE, SETTINGS
from tests.families import build

from lorakeet.base.run_folder import sha256_file, write_text
from lorakeet.data.encode import render
from lorakeet.models.load import read_tokenizer

RESULTS = Path(__file__).parent / "results" / "faults.md"
STEPS, ROWS_PER_STEP, MAX_KILLS = 6, 4, 3
WHERE = ("loss", "gradient", "weight")
GOOD, BAD, STUCK = "same bytes", "other bytes", "could not resume"
CAUGHT, CLEAN = "caught in its step", "nothing on the disk but finite numbers"


class CaughtError(Exception):
    """A fault that the trainer noticed by itself."""


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


class Spoiler:
    """Makes one number NaN at one step, in a model of either trainer."""

    def __init__(self, model: Any, where: str, at: int) -> None:
        self.where, self.at, self.step = where, at, 0
        self.target = next(p for p in model.parameters() if p.requires_grad)
        model.get_input_embeddings().register_forward_hook(self._answer)
        self.target.register_hook(self._flow)

    def begin_step(self) -> None:
        self.step += 1
        if self._is_on("weight"):
            with torch.no_grad():
                self.target.view(-1)[0] = math.nan

    def _is_on(self, where: str) -> bool:
        return self.where == where and self.step == self.at

    def _answer(self, module: Any, _inputs: Any, output: Any) -> Any:
        return output * math.nan if self._is_on("loss") and torch.is_grad_enabled() else None

    def _flow(self, gradient: Any) -> Any:
        return gradient * math.nan if self._is_on("gradient") else gradient


class Lorakeet:
    """Our arm, as a user would run it."""

    name = "Lorakeet"

    def __init__(self, work: Path) -> None:
        self.work = work
        self.recipe = {
            "base": str(work / "base"),
            "data": {"train": str(work / "rows.jsonl"), "validation": 0},
            "method": {"rank": 2, "dropout": 0.1},
            "train": {"max_steps": STEPS, "epochs": 9, "batch_size": ROWS_PER_STEP,
                      "learning_rate": 1e-3, "checkpoint_every_steps": 1},
        }  # fmt: skip

    def warm_up(self, run: Path) -> None:
        """The imports, once for all children."""
        import lorakeet.api.training
        import lorakeet.evaluate.plots
        import lorakeet.train.fit  # noqa: F401
        from lorakeet.models.load import load_model

        load_model(self.recipe["base"])

    def train(self, run: Path) -> None:
        """Trains, or goes on with what is there."""
        from lorakeet.api.training import resume, train

        if (run / "events.jsonl").exists():
            resume(run)
        else:
            train(self.recipe, run)

    def train_spoiled(self, run: Path, where: str, at: int) -> None:
        """Trains with a fault.

        Raises:
            CaughtError: the fault was told in its own step.
        """
        from lorakeet.api.training import train
        from lorakeet.base.errors import BadBatchError
        from lorakeet.train.step import StepRunner

        honest, spoilers = StepRunner.run, []

        def step(runner: Any, *arguments: Any) -> Any:
            spoilers.extend([] if spoilers else [Spoiler(runner.model, where, at)])
            spoilers[0].begin_step()
            return honest(runner, *arguments)

        StepRunner.run = step
        try:
            train(self.recipe, run)
        except BadBatchError as error:
            if str(error).startswith(f"step {at}:"):
                raise CaughtError from error
            raise

    def result_of(self, run: Path) -> Path:
        return run / "adapter" / "adapter_model.safetensors"

    def read_adapter(self, model: Any, folder: Path) -> None:
        from lorakeet.adapters.files import read_adapter

        read_adapter(model, folder)


class TrainerAndPeft:
    """transformers' Trainer with PEFT, saving after every step, resumed as its pages say."""

    name = "Trainer + PEFT"

    def __init__(self, work: Path) -> None:
        self.work = work
        self.tokenizer = read_tokenizer(str(work / "base"))
        from lorakeet.base.records import Turn

        self.rows = []
        for line in (work / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            turns = [Turn(role="user", content=row["question"]),
                     Turn(role="assistant", content=row["answer"])]  # fmt: skip
            ids = self.tokenizer(render(turns, self.tokenizer))["input_ids"]
            self.rows.append({"input_ids": ids, "labels": list(ids)})

    def build(self, run: Path) -> Any:
        import peft
        from transformers import (
            AutoModelForCausalLM,
            DataCollatorForSeq2Seq,
            Trainer,
            TrainingArguments,
            set_seed,
        )

        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(self.work / "base", dtype=torch.float32)
        lora = peft.LoraConfig(r=2, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear",
                               task_type="CAUSAL_LM")  # fmt: skip
        return Trainer(
            model=peft.get_peft_model(model, lora),
            args=TrainingArguments(
                output_dir=str(run), max_steps=STEPS, learning_rate=1e-3, seed=0, use_cpu=True,
                per_device_train_batch_size=ROWS_PER_STEP, save_strategy="steps", save_steps=1,
                save_total_limit=2, logging_steps=1, report_to=[], disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=self.rows,
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, padding=True),
        )  # fmt: skip

    def warm_up(self, run: Path) -> None:
        self.build(run)

    def train(self, run: Path) -> None:
        trainer = self.build(run)
        has_state = run.is_dir() and any(run.glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=True if has_state else None)
        trainer.save_model(str(run / "adapter"))

    def train_spoiled(self, run: Path, where: str, at: int) -> None:
        from transformers import TrainerCallback

        trainer = self.build(run)
        spoiler = Spoiler(trainer.model, where, at)

        class Begin(TrainerCallback):
            def on_step_begin(self, *arguments: Any, **options: Any) -> None:
                spoiler.begin_step()

        trainer.add_callback(Begin())
        try:
            trainer.train()
        except (ValueError, RuntimeError, FloatingPointError) as error:
            if spoiler.step == at:
                raise CaughtError from error
            raise
        trainer.save_model(str(run / "adapter"))

    def result_of(self, run: Path) -> Path:
        return run / "adapter" / "adapter_model.safetensors"

    def read_adapter(self, model: Any, folder: Path) -> None:
        import peft

        peft.PeftModel.from_pretrained(model, folder)


def in_child(work: Callable[[], None]) -> int:
    """Forks a quiet child that does the work; it ends with 0, 3 for a caught fault, or 1."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
        code = 0
    except CaughtError:
        code = 3
    finally:
        os._exit(code)


def wait_for(number: int) -> int:
    """The exit code of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def count_kills(arm: Any, folder: Path, trials: int) -> Counter[str]:
    """How many runs ended with the undisturbed bytes, with others, or not at all."""
    started_s = time.monotonic()
    whole = folder / "whole"
    if wait_for(in_child(lambda: arm.train(whole))):
        raise SystemExit(f"{arm.name}: the undisturbed run failed")
    duration_s, digest = time.monotonic() - started_s, sha256_file(arm.result_of(whole))
    found: Counter[str] = Counter()
    for trial in range(trials):
        draw, run = random.Random(trial), folder / f"kill-{trial}"
        for _ in range(draw.randint(1, MAX_KILLS)):
            child = in_child(lambda r=run: arm.train(r))
            time.sleep(draw.uniform(0, 1.1 * duration_s))
            os.kill(child, signal.SIGKILL)
            wait_for(child)
        if wait_for(in_child(lambda r=run: arm.train(r))):
            found[STUCK] += 1
        else:
            found[GOOD if sha256_file(arm.result_of(run)) == digest else BAD] += 1
        shutil.rmtree(run, ignore_errors=True)
    return found


def count_nans(arm: Any, folder: Path, trials: int) -> Counter[str]:
    """How many faults were caught in their step, and after how many the disk is clean."""
    found: Counter[str] = Counter()
    for trial in range(trials):
        draw, run = random.Random(trial), folder / f"nan-{trial}"
        where, at = WHERE[trial % 3], draw.randint(2, STEPS - 1)
        code = wait_for(in_child(lambda r=run, w=where, n=at: arm.train_spoiled(r, w, n)))
        found[CAUGHT] += code == 3
        found[CLEAN] += all(map(is_finite, run.rglob("*.safetensors")))
        shutil.rmtree(run, ignore_errors=True)
    return found


def is_finite(path: Path) -> bool:
    """Whether every number of a file is one."""
    return all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


def count_refused(arm: Any, folder: Path, trials: int) -> int:
    """How many damaged adapters were refused with an error."""
    from lorakeet.adapters.attach import adapter_parameters, attach
    from lorakeet.adapters.files import write_adapter

    refused = 0
    for trial in range(trials):
        kind, number = KINDS[trial % len(KINDS)], trial // len(KINDS)
        draw, place = random.Random(f"{kind.__name__}-{number}"), folder / f"adapter-{trial}"
        family, settings = SETTINGS[number % len(SETTINGS)]
        source = build(family)
        attach(source, settings)
        with torch.no_grad():
            for parameter in adapter_parameters(source).values():
                parameter.add_(0.1)
        write_adapter(source, place, base="none")
        kind(place, draw)
        model = build(OTHER_BASE[family] if kind.__name__ == "wrong_base" else family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                arm.read_adapter(model, place)
            except Exception:  # noqa: BLE001 - any error is a refusal
                refused += 1
        shutil.rmtree(place)
    return refused


def to_table(asked: argparse.Namespace, found: dict[str, dict[str, str]]) -> str:
    """Each test a row, each trainer a column."""
    arms = list(found)
    rows = list(found[arms[0]])
    lines = [f"| | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(found[arm][row] for arm in arms)} |" for row in rows]
    names = ("lorakeet", "torch", "transformers", "peft", "accelerate")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    lines += ["", f"One run of `python -m benchmarks.faults --kills {asked.kills} --nans "
              f"{asked.nans} --adapters {asked.adapters}`; {versions}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def measure(arm: Any, folder: Path, asked: argparse.Namespace) -> dict[str, str]:
    """All figures of one arm."""
    folder.mkdir()
    arm.warm_up(folder / "warm-up")
    kills = count_kills(arm, folder, asked.kills)
    nans = count_nans(arm, folder, asked.nans)
    refused = count_refused(arm, folder, asked.adapters)
    return {
        "killed 1 to 3 times, resumed, ended with the same bytes": f"{kills[GOOD]}/{asked.kills}",
        "killed: resumed, ended with other bytes": f"{kills[BAD]}/{asked.kills}",
        "killed: could not be resumed": f"{kills[STUCK]}/{asked.kills}",
        "NaN in loss, gradient or weight caught in its step": f"{nans[CAUGHT]}/{asked.nans}",
        "NaN: only finite numbers on the disk afterwards": f"{nans[CLEAN]}/{asked.nans}",
        "damaged adapters refused": f"{refused}/{asked.adapters}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--nans", type=int, default=9)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="keep the table in results/")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        write_work(work)
        found = {}
        for number, arm in enumerate((Lorakeet(work), TrainerAndPeft(work))):
            found[arm.name] = measure(arm, work / f"arm-{number}", asked)
            print(json.dumps({arm.name: found[arm.name]}, indent=1), flush=True)
    table = to_table(asked, found)
    print(table)
    if asked.write:
        write_text(RESULTS, "# The same faults for Lorakeet and for Trainer + PEFT\n\n" + table)


if __name__ == "__main__":
    main()
