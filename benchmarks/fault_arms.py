"""The two trainers that ``benchmarks.faults`` compares, and the fault that spoils a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tests.killed_runs import ROWS_PER_STEP, STEPS, recipe_of

from lorakeet.data.render import render
from lorakeet.models.load import read_tokenizer


class CaughtError(Exception):
    """A fault that the trainer noticed by itself."""


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
        self.recipe = recipe_of(work)
        self.recipe["data"]["validation"] = 0  # Trainer validates nothing

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
