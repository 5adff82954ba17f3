"""The schema of a recipe: everything a run is asked for, with a reason for each default.

A recipe is frozen and strict.  An unknown key is a mistake, never ignored, and
all mistakes are collected by ``base.recipe_file`` before anything is raised.
``Field(description=...)`` says what a setting is, ``why`` says where its default
comes from; ``lorakeet new`` prints both as comments.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Task = Literal["chat", "text", "classify"]
MethodKind = Literal["lora", "full"]
Start = Literal["default", "pissa", "pissa-fast"]
Schedule = Literal["cosine", "linear", "constant"]
Metric = Literal["perplexity", "loss", "accuracy", "f1"]


def setting(default: Any, description: str, *, why: str = "", **limits: Any) -> Any:
    """A field with its meaning, the reason of its default and its limits.

    Args:
        default: the value when the recipe is silent; ``...`` makes it required.
        why: the evidence or reason, printed beside the default.
        limits: pydantic's ``ge``, ``gt``, ``le``, ``lt``, ``min_length``.
    """
    return Field(default, description=description, json_schema_extra={"why": why}, **limits)


class Section(BaseModel):
    """A part of the recipe: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


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


def _to_names(value: Any) -> Any:
    """A YAML list as the tuple that a frozen record needs."""
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_to_names)]


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
    system: str | None = setting(None, "a system prompt for conversations that have none")

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        given = [source.weight is not None for source in self.train]
        if any(given) and not all(given):
            raise ValueError(
                "some sources have a weight and some have none; give it for all or none"
            )
        if isinstance(self.validation, float) and not 0 <= self.validation < 1:
            raise ValueError(f"validation is {self.validation}; a share lies between 0 and 1")
        if self.labels is not None and len(set(self.labels)) < 2:
            raise ValueError("labels needs at least two different names")
        return self


class AdaLoraSettings(Section):
    """AdaLoRA: modules start at method.rank, and the budget falls to target_rank on average."""

    target_rank: int = setting(
        8, "the mean r of all modules at the end", why="the paper's largest budget", ge=1
    )
    warmup_fraction: float = setting(
        0.1, "share of the steps before a rank is taken away", why="scores need history", ge=0, lt=1
    )
    settle_fraction: float = setting(
        0.3, "share of the steps with the final ranks", why="the paper's runs keep 20 to 60 %",
        ge=0, lt=1,
    )  # fmt: skip
    every_steps: int = setting(10, "steps between two choices of ranks", why="as the paper", ge=1)
    beta1: float = setting(0.85, "memory of the sensitivity", why="the paper's value", gt=0, lt=1)
    beta2: float = setting(0.85, "memory of its uncertainty", why="the paper's value", gt=0, lt=1)
    orthogonality: float = setting(
        0.5, "weight of the penalty that keeps P and Q orthogonal", why="as PEFT", ge=0
    )

    @model_validator(mode="after")
    def _check(self) -> AdaLoraSettings:
        if self.warmup_fraction + self.settle_fraction >= 1:
            raise ValueError("warmup_fraction and settle_fraction need a sum below 1")
        return self


_LORA_ONLY = ("adalora", "lora_plus_ratio", "rslora", "dora", "modules_to_save")


class MethodSettings(Section):
    """Which parameters are trained: W' = W + (alpha / r) B A, or all of them."""

    kind: MethodKind = setting("lora", "lora trains an adapter, full trains every weight")
    rank: int = setting(
        16, "r, the inner size of B A", why="enough for most specialist data sets", ge=1
    )
    alpha: float = setting(
        32.0, "the adapter is scaled by alpha / r", why="2 r is the common choice", gt=0
    )
    dropout: float = setting(
        0.0, "dropout before A", why="no gain measured on 1 to 3 epochs", ge=0, lt=1
    )
    targets: str | Names = setting(
        "all-linear",
        "all-linear, a module name, a list of names, or a regular expression",
        why="attention-only is worse even at equal size (arXiv:2405.09673)",
    )
    rslora: bool = setting(
        False, "scale by alpha / sqrt(r)", why="repairs high ranks (arXiv:2312.03732)"
    )
    dora: bool = setting(
        False,
        "train magnitude and direction apart (DoRA)",
        why="helps low ranks, and a step takes longer (arXiv:2402.09353)",
    )
    start: Start = setting(
        "default",
        "where B A starts: at zero, or at the weight's principal directions (PiSSA)",
        why="pissa learns faster at first (arXiv:2404.02948), zero is proven everywhere",
    )
    lora_plus_ratio: float | None = setting(
        None, "learning rate of B over that of A; 16 is LoRA+ (arXiv:2402.12354)", gt=0
    )
    rank_pattern: dict[str, int] = setting({}, "another rank for matching module names")
    alpha_pattern: dict[str, float] = setting({}, "another alpha for matching module names")
    adalora: AdaLoraSettings | None = setting(
        None, "a rank budget that goes where it matters (AdaLoRA, arXiv:2303.10512)"
    )
    modules_to_save: Names = setting(
        (), "modules trained in full and saved with the adapter, such as a new head"
    )

    @model_validator(mode="after")
    def _check(self) -> MethodSettings:
        problems = [
            f"rank_pattern gives {name} rank {r}; it needs at least 1"
            for name, r in self.rank_pattern.items()
            if r < 1
        ]
        problems += [
            f"alpha_pattern gives {name} alpha {alpha}; it needs more than 0"
            for name, alpha in self.alpha_pattern.items()
            if not alpha > 0
        ]
        if self.adalora:
            others = {"dora": self.dora, "rslora": self.rslora, "start": self.start != "default"}
            problems += [f"adalora has its own form, so {key} cannot be on" for key in others
                         if others[key]]  # fmt: skip
            if self.adalora.target_rank > self.rank:
                problems.append(
                    f"adalora.target_rank {self.adalora.target_rank} is above rank {self.rank}, "
                    "from which the budget falls"
                )
        if self.kind == "full":
            asked = [name for name in _LORA_ONLY if getattr(self, name) not in (None, False, ())]
            asked += ["start"] if self.start != "default" else []
            problems += [f"{name} needs kind: lora" for name in asked]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class EarlyStopping(Section):
    """Stop when the validation metric has not improved for ``patience`` looks; the best is kept."""

    metric: Metric = setting("perplexity", "what must improve")
    patience: int = setting(3, "looks without improvement before the run stops", ge=1)


class TrainSettings(Section):
    """How the parameters move."""

    learning_rate: float = setting(
        2.0e-4, "the peak rate", why="about 10x full fine-tuning's; nearly independent of r", gt=0
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
        "auto", "tokens that pass the model at once; changes memory, not the result"
    )
    packing: bool = setting(
        True,
        "samples lie end to end without padding and do not see each other",
        why="same gradients, no wasted slot; a model whose answers would differ is padded",
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
    train: TrainSettings = Field(TrainSettings(), description="how they move")
    evaluate: EvaluateSettings = Field(EvaluateSettings(), description="what is asked afterwards")

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        stopping = self.train.early_stopping
        if stopping and self.task != "classify" and stopping.metric in ("accuracy", "f1"):
            raise ValueError(f"early_stopping.metric {stopping.metric} needs task: classify")
        return self
