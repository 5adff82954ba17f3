"""The plan of a run: what each method needs, what fits, and which one is chosen and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakeet.base.recipe import Recipe
from lorakeet.base.units import to_readable_bytes
from lorakeet.plan.hardware import Hardware, read_hardware
from lorakeet.plan.memory import AUTO_MICRO_BATCH_TOKENS, KINDS, MemoryParts, estimate_memory
from lorakeet.plan.model_facts import ModelFacts, read_model_facts
from lorakeet.plan.speed import estimate_tokens_per_s, measure_matmul_rate
from lorakeet.plan.trained import count_trained

HEADROOM_FRACTION = 0.9  # of the free memory; the rest is for the system and fragments
TRAINABLE = ("full", "lora")


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One method at this recipe and machine.

    Args:
        tokens_per_s: predicted; None where it cannot be told (GPU).
        why: one sentence.
    """

    kind: str
    trained_parameters: int
    trained_fraction: float
    memory: MemoryParts
    fits: bool
    tokens_per_s: float | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a plan says."""

    hardware: Hardware
    facts: ModelFacts
    methods: tuple[MethodPlan, ...]
    chosen: str
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON."""
        methods = [
            {
                "kind": m.kind,
                "trained_parameters": m.trained_parameters,
                "trained_fraction": m.trained_fraction,
                "bytes": m.memory.to_dict(),
                "fits": m.fits,
                "tokens_per_s": m.tokens_per_s,
                "why": m.why,
            }
            for m in self.methods
        ]
        return {
            "machine": {**asdict(self.hardware), "name": self.hardware.name},
            "model": {"parameters": self.facts.parameters, "type": self.facts.model_type,
                      "layers": self.facts.layers, "hidden": self.facts.hidden},
            "methods": methods,
            "chosen": self.chosen,
            "advice": list(self.advice),
        }  # fmt: skip


def make_plan(recipe: Recipe, base_folder: Path, hardware: Hardware | None = None) -> Plan:
    """What each method needs on this machine, and the one that will be used.

    The recipe's own method stands when it fits; otherwise the first that fits is
    named, 16 or 32 bits before fewer.

    Raises:
        FileFormatError: ``config.json`` cannot be understood.
    """
    machine = hardware or read_hardware()
    labels = len(recipe.data.labels or ()) or 2
    facts = read_model_facts(base_folder, num_labels=labels if recipe.task == "classify" else None)
    rate = None if machine.gpus else measure_matmul_rate()
    methods = tuple(_plan_method(kind, recipe, facts, machine, rate) for kind in KINDS)
    fitting = [m.kind for m in methods if m.fits]
    chosen = recipe.method.kind
    if chosen not in fitting:
        chosen = next((k for k in ("lora", "lora-8bit", "qlora") if k in fitting), "none")
    return Plan(
        hardware=machine, facts=facts, methods=methods, chosen=chosen,
        advice=tuple(_advise(recipe, facts)),
    )  # fmt: skip


def _plan_method(
    kind: str, recipe: Recipe, facts: ModelFacts, machine: Hardware, rate: float | None
) -> MethodPlan:
    """One row of the plan."""
    asked = recipe.train.micro_batch_tokens
    limit = AUTO_MICRO_BATCH_TOKENS if asked == "auto" else asked
    tokens = max(limit, recipe.data.max_tokens)  # one long sample is never split
    method = recipe.method
    counted = count_trained(facts, method, is_classifier=recipe.task == "classify")
    trained = facts.parameters if kind == "full" else counted.total
    memory = estimate_memory(
        facts,
        kind,
        trained_parameters=trained,
        micro_batch_tokens=tokens,
        is_gpu=bool(machine.gpus),
    )
    room = int(HEADROOM_FRACTION * machine.usable_bytes)
    return MethodPlan(
        kind=kind, trained_parameters=trained, trained_fraction=trained / facts.parameters,
        memory=memory, fits=memory.total <= room,
        tokens_per_s=estimate_tokens_per_s(facts, kind, rate) if rate else None,
        why=_explain(kind, memory, room),
    )  # fmt: skip


def _explain(kind: str, memory: MemoryParts, room: int) -> str:
    """Why a method fits or not, and what it is for."""
    need, have = to_readable_bytes(memory.total), to_readable_bytes(room)
    if memory.total > room:
        parts = memory.to_dict()
        largest = max((p for p in parts if p != "total"), key=parts.__getitem__)
        return f"needs {need} and {have} is free; the largest part is {largest}."
    purpose = {
        "full": "trains every weight; forgets more and needs about a tenth of LoRA's rate",
        "lora": "trains a small adapter on an exact base; the first choice",
        "lora-8bit": "halves or quarters the base; predicted only, this version does not train it",
        "qlora": "4-bit base; predicted only, this version does not train it",
    }[kind]
    return f"needs {need} of {have}: {purpose}."


def _advise(recipe: Recipe, facts: ModelFacts) -> list[str]:
    """Where common guidance and evidence differ from what is asked."""
    method, train = recipe.method, recipe.train
    advice = []
    if method.kind == "lora" and method.targets != "all-linear" and facts.is_decoder:
        advice.append(
            "targets: adapting all linear layers is better than attention only, even at equal "
            "parameter count (arXiv:2405.09673)."
        )
    if method.kind == "lora" and method.rank > 32 and not method.rslora:
        advice.append(
            f"rank {method.rank} with alpha / r shrinks the change; method.rslora: true scales by "
            "alpha / sqrt(r) (arXiv:2312.03732)."
        )
    if method.kind == "lora" and train.batch_size > 32:
        advice.append("batch_size: LoRA bears more than about 32 samples a step badly.")
    if method.kind == "full" and train.learning_rate > 1e-4 and facts.parameters > 5e7:
        advice.append("learning_rate: full fine-tuning wants about a tenth of LoRA's rate.")
    return advice
