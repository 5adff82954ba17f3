"""What an adapter looks like: the public ``Lora`` record and its checks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakeet.base.errors import RequestError

ALL_LINEAR = "all-linear"
DEFAULT_START, PISSA, PISSA_FAST, LOFTQ = "default", "pissa", "pissa-fast", "loftq"
NO_BIAS, LORA_BIAS, ALL_BIASES = "none", "lora_only", "all"
BIASES = (NO_BIAS, LORA_BIAS, ALL_BIASES)
PISSA_STARTS = (PISSA, PISSA_FAST)
STARTS = (DEFAULT_START, *PISSA_STARTS, LOFTQ)


@dataclass(frozen=True, kw_only=True)
class AdaLora:
    """How AdaLoRA spends its rank budget (see ``adapters.adalora``).

    Args:
        target_rank: the mean r of all modules at the end.
        warmup_fraction: t_i / T, the share of the steps before anything is pruned.
        settle_fraction: t_f / T, the share of the steps with the final ranks.
        every_steps: steps between two choices.
        beta1, beta2: memory of sensitivity and of uncertainty.
        orthogonality: gamma, the weight of the penalty.
    """

    target_rank: int = 8
    warmup_fraction: float = 0.1
    settle_fraction: float = 0.3
    every_steps: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The shape of a LoRA adapter, W' = W + (alpha / r) B A.

    Args:
        rank: r, 1 or more; the inner size of B A.
        alpha: above 0; the scale is alpha / r, or alpha / sqrt(r) with ``rslora``.
        dropout: before A, 0 to below 1.
        targets: ``all-linear``, one name or regular expression, or several names.
        exclude: names, or one regular expression, that are passed over among the targets.
        layers: numbers of the layers that are adapted; empty for all of them.
        layers_pattern: names of the lists of layers that are counted, such as ``h``; empty
            for the first number in a module's name.
        rank_pattern: another r for matching module names; alpha_pattern likewise.
        modules_to_save: modules that are copied, trained in full and saved too.
        bias: ``none``, ``lora_only`` (biases of the adapted layers) or ``all`` are trained too.
        dora: magnitude and direction apart (arXiv:2402.09353).
        start: ``default`` (B A is zero), or ``pissa`` and ``pissa-fast``, the principal
            directions of the weight by an exact or a randomised SVD (arXiv:2404.02948), or
            ``loftq``, the rounding error of a quantised weight (``models.loftq``).
        adalora: a rank budget for the whole model; ``rank`` is then every module's r at first.
        vera: the seed of A and B that all layers share (``adapters.vera``; PEFT's
            ``projection_prng_key``), without alpha; None trains A and B.

    Raises:
        RequestError: a number is out of its range, or options contradict each other.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = NO_BIAS
    dora: bool = False
    start: str = DEFAULT_START
    adalora: AdaLora | None = None
    vera: int | None = None

    def __post_init__(self) -> None:
        ranks = [self.rank, *self.rank_pattern.values()]
        alphas = [self.alpha, *self.alpha_pattern.values()]
        problems = [f"rank is {r}; needed is 1 or more" for r in ranks if r < 1]
        problems += [
            f"alpha is {a}; needed is a finite number above 0, as 0 would switch the adapter off"
            for a in alphas
            if not (a > 0 and math.isfinite(a))
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}; needed is 0 to below 1")
        if wrong := [number for number in self.layers if number < 0]:
            problems.append(f"layers are {wrong}; needed are numbers from 0")
        if self.layers_pattern and not self.layers:
            problems.append("layers_pattern is given without layers, so it selects nothing")
        if self.bias not in BIASES:
            problems.append(f"bias is {self.bias}; needed is one of {', '.join(BIASES)}")
        if self.start not in STARTS:
            problems.append(f"start is {self.start}; needed is one of {', '.join(STARTS)}")
        overlap = set(self.modules_to_save) & (
            set(self.targets) if isinstance(self.targets, tuple) else {self.targets}
        )
        if overlap:
            problems.append(
                f"{', '.join(sorted(overlap))} stands in targets and in modules_to_save; a module "
                "is adapted or trained in full, not both"
            )
        problems += _wrong_budget(self) if self.adalora else []
        problems += _wrong_vera(self) if self.vera is not None else []
        if problems:
            raise RequestError(". ".join(problems) + ".")

    def rank_of(self, module: str) -> int:
        """r of a module, its pattern first."""
        return look_up(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """alpha of a module, its pattern first."""
        return look_up(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """The factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA; 1 with VeRA."""
        if self.vera is not None:
            return 1.0
        r, alpha = self.rank_of(module), self.alpha_of(module)
        return alpha / math.sqrt(r) if self.rslora else alpha / r


def _wrong_budget(settings: Lora) -> list[str]:
    """What is wrong with AdaLoRA's numbers, or contradicts it."""
    budget = settings.adalora
    others = {
        "dora": settings.dora,
        "rslora": settings.rslora,
        "start": settings.start != DEFAULT_START,
        "bias": settings.bias != NO_BIAS,
    }
    problems = [f"adalora has its own form, so {key} cannot be on" for key in others if others[key]]
    if not 1 <= budget.target_rank <= settings.rank:
        problems.append(
            f"adalora.target_rank is {budget.target_rank}; needed is 1 to rank {settings.rank}"
        )
    if min(budget.warmup_fraction, budget.settle_fraction) < 0 or (
        budget.warmup_fraction + budget.settle_fraction >= 1
    ):
        problems.append("adalora.warmup_fraction and settle_fraction need a sum below 1")
    if not (0 < budget.beta1 < 1 and 0 < budget.beta2 < 1):
        problems.append("adalora.beta1 and beta2 need to lie between 0 and 1")
    if budget.every_steps < 1 or budget.orthogonality < 0:
        problems.append("adalora.every_steps needs 1 or more, orthogonality 0 or more")
    return problems


def _wrong_vera(settings: Lora) -> list[str]:
    """What contradicts VeRA."""
    others = {
        "dora": settings.dora,
        "rslora": settings.rslora,
        "start": settings.start != DEFAULT_START,
        "bias": settings.bias != NO_BIAS,
        "adalora": settings.adalora is not None,
        "rank_pattern": bool(settings.rank_pattern),
        "alpha_pattern": bool(settings.alpha_pattern),
    }
    return [f"vera shares one A and B, so {key} cannot be on" for key in others if others[key]]


def look_up(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first key that is the module's name or its end at a dot.

    Keys are regular expressions, as in PEFT.

    >>> look_up({"q_proj": 4}, "layers.0.q_proj", 8), look_up({"proj": 4}, "layers.0.q_proj", 8)
    (4, 8)
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
