"""The schema of a recipe: everything a run is asked for, with a reason for each default.

A recipe is frozen and strict.  An unknown key is a mistake, never ignored, and
all mistakes are collected by ``base.recipe_file`` before anything is raised.
``setting(default, description)`` says what a setting is, ``why`` says where its default
comes from; ``lorakeet new`` prints both as comments.  ``base.method_settings`` holds
the section ``method``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.plan_settings import PlanSettings
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.section import Names, Section, setting

Task = Literal["chat", "text", "classify"]
Schedule = Literal["cosine", "linear", "constant"]
Metric = Literal["perplexity", "loss", "accuracy", "f1"]


class Source(Section):
    """One place that training rows come from."""

    path: str = setting(..., "a file, a folder or a glob", min_length=1)
    weight: float | None = setting(
        None,
        "share of the mix; give it for every source or for none",
        why="without weights every row is seen once an epoch",
        gt=0,
    )


def _to_sources(value: Any) -> Any:
    """``a.jsonl`` or ``[a.jsonl, {path: b.jsonl}]`` as a list of sources."""
    rows = value if isinstance(value, (list, tuple)) else [value]
    return tuple({"path": row} if isinstance(row, str) else row for row in rows)


class DataSettings(Section):
    """What is trained on, and how rows become samples."""

    train: Annotated[tuple[Source, ...], BeforeValidator(_to_sources)] = setting(
        ..., "files, folders or globs with training rows", min_length=1
    )
    validation: float | str = setting(
        0.05,
        "a share of the rows, or a path, or 0 for none",
        why="5 % is enough to see overfitting; rows are chosen by content hash",
    )
    max_tokens: int = setting(
        1024, "the window of one sample, in tokens", why="covers most instruction data", ge=8
    )
    too_long: Literal["drop", "cut"] = setting(
        "drop",
        "what happens to a sample over the window; each one is listed in dropped.jsonl",
        why="a cut answer teaches the model to stop in the middle",
    )
    clean: bool = setting(True, "repair encodings, spaces and control characters")
    deduplicate: bool = setting(
        True, "drop repeated rows", why="repeats are memorised and leak into validation"
    )
    private_data: Literal["mask", "keep"] = setting(
        "mask",
        "e-mail addresses, phone, card and identity numbers in training rows",
        why="a model repeats what it was trained on",
    )
    labels: Names | None = setting(None, "class names for task classify; found when absent")
    text_column: str | None = setting(None, "the column of the text, when it is not recognised")
    label_column: str | None = setting(None, "the column of the label or answer, likewise")
    chat_template: str | None = setting(
        None,
        "for a base without a chat template: plain, alpaca, or a jinja file",
        why="null takes the base's own, which it was trained with",
    )
    system: str | None = setting(None, "a system prompt for conversations that have none")
    workers: int | Literal["auto"] = setting(
        "auto",
        "processes that encode rows beside the first; the samples do not depend on it",
        why="auto is one for each further core, once there are more than 1,000 rows",
    )

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        given = [source.weight is not None for source in self.train]
        if any(given) and not all(given):
            raise ValueError(
                "some sources have a weight and some have none; give it for all or none"
            )
        if isinstance(self.validation, float) and not 0 <= self.validation < 1:
            raise ValueError(f"validation is {self.validation}; a share lies between 0 and 1")
        if self.workers != "auto" and self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it needs at least 0, or auto")
        if self.labels is not None and len(set(self.labels)) < 2:
            raise ValueError("labels needs at least two different names")
        return self


def _to_word(value: Any) -> Any:
    """``true`` and ``false`` as ``on`` and ``off``."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class EarlyStopping(Section):
    """Stop when the validation metric has not improved for ``patience`` looks; the best is kept."""

    metric: Metric = setting("perplexity", "what must improve")
    patience: int = setting(3, "looks without improvement before the run stops", ge=1)


class TrainSettings(Section):
    """How the parameters move."""

    learning_rate: float = setting(
        2.0e-4, "the peak rate", why="about 10x full fine-tuning's; nearly independent of r", gt=0
    )
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-8bit-paged"] = setting(
        "adamw",
        "AdamW with moments in float32 (8 bytes a trained parameter) or in 8 bits (2.03 bytes); "
        "paged ones lie in main memory instead of the GPU's",
        why="LoRA's moments are small; adamw-8bit matters for kind: full (arXiv:2110.02861)",
    )
    epochs: float = setting(3, "passes over the data", why="1 to 3, early stopping decides", gt=0)
    max_steps: int | None = setting(None, "an upper limit on optimiser steps", ge=1)
    batch_size: int = setting(
        16,
        "samples per optimiser step, whatever the micro-batches",
        why="LoRA bears batches above about 32 badly (LoRA Without Regret, 2025)",
        ge=1,
    )
    micro_batch_tokens: int | Literal["auto"] = setting(
        "auto",
        "tokens that pass the model at once; changes memory, not the result",
        why="auto: 1024, as fast as more; up to 8192 where long shared openings then cost less",
    )
    packing: bool = setting(
        True,
        "samples lie end to end without padding and do not see each other",
        why="same gradients, no wasted slot; a model whose answers would differ is padded",
    )
    share_prefixes: bool = setting(
        True,
        "tokens that samples of a pack open with are computed once",
        why="same gradients; off by itself under dropout and where little is shared",
    )
    cache_frozen_layers: Literal["auto", "on", "off"] = setting(
        "auto",
        "layers below the first that trains are computed once a sample and kept on disk",
        why="same numbers in later epochs; auto where it pays and there is room",
    )
    gradient_checkpointing: Annotated[
        Literal["auto", "off", "on", "offload"], BeforeValidator(_to_word)
    ] = setting(
        "auto",
        "layers are computed again in the backward pass instead of kept; offload also holds their "
        "inputs in main memory",
        why="same gradients, up to half more time; auto begins when one sample does not fit",
    )
    schedule: Schedule = setting("cosine", "how the rate falls after the warm-up")
    warmup_fraction: float = setting(0.03, "share of the steps with a rising rate", ge=0, lt=1)
    weight_decay: float = setting(0.0, "AdamW's decay of matrices", ge=0)
    max_gradient_norm: float = setting(1.0, "gradients are scaled down to this norm", gt=0)
    seed: int = setting(0, "all randomness of the run follows from it", ge=0)
    evaluate_every_steps: int | Literal["auto"] = setting(
        "auto", "a look at the validation data", why="auto is ten looks a run"
    )
    checkpoint_every_steps: int = setting(50, "state that a killed run resumes from", ge=1)
    early_stopping: EarlyStopping | None = setting(
        EarlyStopping(), "null trains to the end", why="the most common remedy for overfitting"
    )
    sample_prompts: Names = setting((), "answered at each look, to read with your own eyes")
    skip_bad_batches: int = setting(
        0,
        "batches in a row that may be passed over when their loss or gradient is not finite; "
        "one more stops the run at the last good state",
        why="NaN has a cause; 0 stops at the first one",
        ge=0,
    )

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        for name in ("micro_batch_tokens", "evaluate_every_steps"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}; it needs at least 1, or auto")
        return self


class EvaluateSettings(Section):
    """Questions with known answers, asked of the base and of the tuned model."""

    questions: str | None = setting(None, "the domain: rows with messages (or question) and answer")
    general: str | None = setting(
        None, "general skills, to see what was forgotten; starter-skills is embedded"
    )
    max_new_tokens: int = setting(32, "the longest answer", ge=1)


class Recipe(Section):
    """One run, from base model and data to a specialist."""

    base: str = setting(
        ..., "a folder, a Hub id, ms://owner/name for ModelScope, or starter", min_length=1
    )
    task: Task = setting("chat", "chat and text train a language model, classify a classifier")
    data: DataSettings = Field(..., description="what is trained on")
    method: MethodSettings = Field(MethodSettings(), description="which parameters are trained")
    quantization: QuantizationSettings = Field(
        QuantizationSettings(), description="in how many bits the base is held"
    )
    train: TrainSettings = Field(TrainSettings(), description="how they move")
    plan: PlanSettings = Field(PlanSettings(), description="what is looked at before it begins")
    evaluate: EvaluateSettings = Field(EvaluateSettings(), description="what is asked afterwards")

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        stopping = self.train.early_stopping
        if stopping and self.task != "classify" and stopping.metric in ("accuracy", "f1"):
            raise ValueError(f"early_stopping.metric {stopping.metric} needs task: classify")
        if self.quantization.is_on and self.method.kind != "lora":
            raise ValueError(
                f"quantization.kind {self.quantization.kind} needs method.kind: lora, as weights "
                "in few bits are frozen"
            )
        if self.method.start == "loftq" and not self.quantization.is_on:
            raise ValueError(
                "method.start loftq repairs the rounding of a quantised base, and "
                "quantization.kind is off; set it to nf4 or int8, or leave start out"
            )
        if self.quantization.activations != "full":
            raise ValueError(
                "quantization.activations int8 is to serve and evaluate, as gradients need the "
                "inputs that were there. Leave it out, and serve with --quantization "
                "int8-activations"
            )
        return self
