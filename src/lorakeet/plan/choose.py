"""The plan of a run: what each method needs, what fits, and which one is chosen and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakeet.base.recipe import Recipe
from lorakeet.base.units import to_readable_bytes, to_readable_seconds
from lorakeet.plan.advice import advise
from lorakeet.plan.case import PlanCase
from lorakeet.plan.hardware import Hardware, read_training_hardware
from lorakeet.plan.knobs import Knob, list_knobs
from lorakeet.plan.memory import KINDS, MemoryParts, count_micro_batch_tokens, kind_of
from lorakeet.plan.model_facts import ModelFacts, read_model_facts
from lorakeet.plan.remedies import list_remedies
from lorakeet.plan.speed import Rates, find_rates
from lorakeet.plan.trained import count_trained

# What stands in where the asked method does not fit: exact weights first.
INSTEAD = {
    "full": KINDS, "lora": KINDS[1:], "lora-8bit": KINDS[2:], "qlora": KINDS[3:],
}  # fmt: skip
MISNAMED = "cannot be trained: targets or modules_to_save name what this model does not have"
PURPOSE = {
    "full": "trains every weight; forgets more and needs about a tenth of LoRA's rate",
    "lora": "trains a small adapter on an exact base; the first choice",
    "lora-8bit": "trains a small adapter on a base of 8 bits; where 16 do not fit",
    "qlora": "trains a small adapter on a base of 4 bits; where nothing else fits",
}


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One method at this recipe and machine.

    Args:
        fits: whether the predicted memory is there.
        is_trainable: whether this version can train it here at all.
        tokens_per_s: predicted; None where the card is not known.
        run_s: predicted time of all epochs without validation; None where speed or data are
            not known.
        cost: of the run, in the unit of the price; None where time or price are not known.
        cost_per_million_tokens: likewise, of training on a million tokens.
        why: one sentence.
    """

    kind: str
    trained_parameters: int
    trained_fraction: float
    memory: MemoryParts
    fits: bool
    is_trainable: bool
    tokens_per_s: float | None
    run_s: float | None
    why: str
    cost: float | None = None
    cost_per_million_tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a plan says.

    Args:
        chosen: the method to train with; None when nothing that this version trains fits, or
            the targets match nothing.
        advice: mistakes in names, and where evidence speaks against a setting.
        remedies: what would fit, where the method that is asked for does not.
        knobs: what each setting would save of what the asked method needs.
        rates: of the device, from which speeds are predicted; None where it is not known.
        measured: what real steps took (``api.measuring.Measured``), when they were made.
    """

    hardware: Hardware
    facts: ModelFacts
    methods: tuple[MethodPlan, ...]
    chosen: str | None
    advice: tuple[str, ...]
    remedies: tuple[str, ...] = ()
    knobs: tuple[Knob, ...] = ()
    rates: Rates | None = None
    measured: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON."""
        methods = [
            {**{k: v for k, v in vars(m).items() if k != "memory"}, "bytes": m.memory.to_dict()}
            for m in self.methods
        ]
        return {
            "machine": {
                **asdict(self.hardware), "name": self.hardware.name,
                "gpus": [asdict(gpu) for gpu in self.hardware.gpus],
            },
            "model": {"parameters": self.facts.parameters, "type": self.facts.model_type,
                      "layers": self.facts.layers, "hidden": self.facts.hidden},
            "methods": methods,
            "chosen": self.chosen,
            "advice": list(self.advice),
            "remedies": list(self.remedies),
            "knobs": [asdict(knob) for knob in self.knobs],
            "rates": asdict(self.rates) if self.rates else None,
            **({"measured": self.measured} if self.measured else {}),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What is known of the data once it is prepared.

    Args:
        num_run_tokens: tokens that pass the model in the whole run, all epochs together.
        num_labels: classes of task classify.
        max_micro_batch_tokens: of the longest rows that can meet; the recipe's limit when None.
        row_tokens: of the sample that a token stands in, on average over tokens; half of
            ``data.max_tokens`` when None.
        longest_row: tokens of the longest sample; ``data.max_tokens`` when None.
    """

    num_run_tokens: int | None = None
    num_labels: int | None = None
    max_micro_batch_tokens: int | None = None
    row_tokens: float | None = None
    longest_row: int | None = None


def make_plan(
    recipe: Recipe,
    base_folder: Path,
    hardware: Hardware | None = None,
    *,
    data: DataFacts | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """What each method needs on this machine, and the one that will be used.

    The recipe's own method stands when it fits; where it does not, the next one with fewer
    bytes may: exact weights first, 4 bits last.

    Args:
        hardware: this machine when absent.
        data: without it no run time is told, and two classes are taken for task classify.
        price_per_hour: of the machine, in any currency; costs are told in it.

    Raises:
        FileFormatError: ``config.json`` cannot be understood.
    """
    machine, known = hardware or read_training_hardware(), data or DataFacts()
    is_classifier = recipe.task == "classify"
    labels = known.num_labels or len(recipe.data.labels or ()) or 2
    facts = read_model_facts(base_folder, num_labels=labels if is_classifier else None)
    case = PlanCase(
        recipe=recipe,
        facts=facts,
        counted=count_trained(facts, recipe.method, is_classifier=is_classifier),
        machine=machine,
        micro_batch_tokens=known.max_micro_batch_tokens or count_micro_batch_tokens(recipe),
        row_tokens=known.row_tokens or recipe.data.max_tokens / 2,
        longest_row=known.longest_row or recipe.data.max_tokens,
        rates=find_rates(machine),
        num_run_tokens=known.num_run_tokens,
        price_per_hour=price_per_hour,
    )
    methods = tuple(_plan_method(kind, case) for kind in KINDS)
    possible = {m.kind for m in methods if m.fits and m.is_trainable}
    asked = kind_of(recipe)
    chosen = next((kind for kind in INSTEAD[asked] if kind in possible), None)
    return Plan(
        hardware=machine, facts=facts, methods=methods, chosen=chosen,
        advice=tuple(advise(recipe, facts, case.counted)),
        remedies=tuple(list_remedies(case, asked, chosen)),
        knobs=list_knobs(recipe, facts, asked, micro_batch_tokens=case.micro_batch_tokens,
                         longest_row=case.longest_row, is_gpu=bool(machine.gpus)),
        rates=case.rates,
    )  # fmt: skip


def _plan_method(kind: str, case: PlanCase) -> MethodPlan:
    """One row of the plan."""
    trained = case.trained_by(kind)
    memory = case.memory_of(kind, case.micro_batch_tokens)
    speed = case.speed_of(kind)
    run_s = case.num_run_tokens / speed if speed and case.num_run_tokens else None
    return MethodPlan(
        kind=kind, trained_parameters=trained, trained_fraction=trained / case.facts.parameters,
        memory=memory, fits=memory.total <= case.room,
        is_trainable=case.can_train(kind), tokens_per_s=speed, run_s=run_s,
        why=_explain(kind, memory, case, run_s),
        cost=_price(case, run_s),
        cost_per_million_tokens=_price(case, 1e6 / speed if speed else None),
    )  # fmt: skip


def _price(case: PlanCase, duration_s: float | None) -> float | None:
    """What the machine costs for a time."""
    if duration_s is None or case.price_per_hour is None:
        return None
    return duration_s / 3600 * case.price_per_hour


def _explain(kind: str, memory: MemoryParts, case: PlanCase, run_s: float | None) -> str:
    """Why a method fits or not, and what it is for."""
    need, have = to_readable_bytes(memory.total), to_readable_bytes(case.room)
    purpose = PURPOSE[kind]
    if not case.can_train(kind):
        purpose = MISNAMED
    if memory.total > case.room:
        largest = max(asdict(memory), key=asdict(memory).__getitem__)
        note = "" if purpose.startswith("trains") else f"; {purpose}"
        return f"needs {need} and {have} is free; the largest part is {largest}{note}."
    time = f", about {to_readable_seconds(run_s)}" if run_s and case.can_train(kind) else ""
    return f"needs {need} of {have}{time}: {purpose}."
