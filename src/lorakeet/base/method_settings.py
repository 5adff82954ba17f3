"""The section ``method`` of a recipe: which parameters are trained, and in which form."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lorakeet.base.section import Names, Section, setting

MethodKind = Literal["lora", "full"]
Start = Literal["default", "pissa", "pissa-fast", "loftq"]
Bias = Literal["none", "lora_only", "all"]


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


_OFF = (None, False, (), {}, "", "default", "none")
_NOT_IN_VERA = (
    "dora", "rslora", "start", "bias", "adalora", "lora_plus_ratio", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip
_LORA_ONLY = (
    "adapter", "adalora", "bias", "layers", "exclude", "lora_plus_ratio", "rslora", "dora", 
    "start", "modules_to_save", "vera",
)  # fmt: skip


class MethodSettings(Section):
    """Which parameters are trained: W' = W + (alpha / r) B A, or all of them."""

    kind: MethodKind = setting("lora", "lora trains an adapter, full trains every weight")
    adapter: str | None = setting(
        None,
        "an adapter (or run) folder that training goes on from; its rank, targets and so on hold",
        why="null starts a new adapter",
    )
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
    exclude: str | Names = setting(
        (), "targets that are passed over: a list of names, or a regular expression"
    )
    layers: tuple[int, int] | None = setting(
        None, "the first and the last layer to adapt, counted from 0", why="null is all layers"
    )
    bias: Bias = setting(
        "none", "biases that are trained too: none, lora_only (of adapted layers), or all"
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
        "where B A starts: at zero, at the weight's principal directions (pissa), or at the "
        "rounding error of a quantised base (loftq)",
        why="pissa learns faster at first (arXiv:2404.02948), loftq repairs few bits "
        "(arXiv:2310.08659); zero is proven everywhere",
    )
    lora_plus_ratio: float | None = setting(
        None, "learning rate of B over that of A; 16 is LoRA+ (arXiv:2402.12354)", gt=0
    )
    rank_pattern: dict[str, int] = setting({}, "another rank for matching module names")
    alpha_pattern: dict[str, float] = setting({}, "another alpha for matching module names")
    adalora: AdaLoraSettings | None = setting(
        None, "a rank budget that goes where it matters (AdaLoRA, arXiv:2303.10512)"
    )
    vera: bool = setting(
        False,
        "random A and B shared by all layers, and trained vectors (VeRA, arXiv:2310.11454)",
        why="a tenth of LoRA's file and less; takes rank 256 and more, and higher rates",
    )
    modules_to_save: Names = setting(
        (), "modules trained in full and saved with the adapter, such as a new head"
    )

    @model_validator(mode="after")
    def _check(self) -> MethodSettings:
        problems = [*_wrong_names(self), *_wrong_numbers(self)]
        if self.adalora:
            others = [key for key in ("dora", "rslora", "start", "bias") if _is_set(self, key)]
            problems += [f"adalora has its own form, so {key} cannot be on" for key in others]
            if (goal := self.adalora.target_rank) > self.rank:
                problems.append(
                    f"adalora.target_rank {goal} is above rank {self.rank}, where the budget starts"
                )
        if self.vera:
            others = [key for key in _NOT_IN_VERA if _is_set(self, key)]
            others += ["alpha"] if self.alpha != type(self).model_fields["alpha"].default else []
            problems += [f"vera shares one A and B, so {key} cannot be set" for key in others]
        if self.kind == "full":
            problems += [f"{key} needs kind: lora" for key in _LORA_ONLY if _is_set(self, key)]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _is_set(method: MethodSettings, key: str) -> bool:
    """Whether an option is on."""
    return getattr(method, key) not in _OFF


def _wrong_names(method: MethodSettings) -> list[str]:
    """What is wrong with the modules that are named."""
    targets, saved = method.targets, method.modules_to_save
    problems = [] if targets else ["targets is empty; it needs all-linear, a name or names"]
    if both := sorted(({targets} if isinstance(targets, str) else set(targets)) & set(saved)):
        problems.append(
            f"{', '.join(both)} stands in targets and in modules_to_save; a module is adapted or "
            "trained in full, not both"
        )
    return problems


def _wrong_numbers(method: MethodSettings) -> list[str]:
    """What is wrong with patterns and layers."""
    problems = [
        f"rank_pattern gives {name} rank {r}; it needs at least 1"
        for name, r in method.rank_pattern.items()
        if r < 1
    ]
    problems += [
        f"alpha_pattern gives {name} alpha {alpha}; it needs more than 0"
        for name, alpha in method.alpha_pattern.items()
        if not alpha > 0
    ]
    if method.layers and not 0 <= method.layers[0] <= method.layers[1]:
        problems.append(
            f"layers is {list(method.layers)}; it needs the first and the last layer, from 0 up"
        )
    return problems
