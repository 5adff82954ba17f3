"""What to change where the method that a recipe asks for does not fit."""

from __future__ import annotations

from lorakeet.base.units import to_readable_bytes, to_readable_count
from lorakeet.plan.case import PlanCase
from lorakeet.plan.knobs import MIN_TOKENS
from lorakeet.plan.memory import KINDS

SETTING = {
    "full": "method.kind: full", "lora": "method.kind: lora",
    "lora-8bit": "quantization.kind: int8", "qlora": "quantization.kind: nf4",
}  # fmt: skip


def list_remedies(case: PlanCase, asked: str, chosen: str | None) -> list[str]:
    """Sentences, exact bases first; none where what is asked for fits.

    Args:
        chosen: the method that fits in its place, as the rest of the recipe stands.
    """
    if chosen == asked or not case.can_train("lora"):
        return []
    said = []
    if tokens := _find_tokens(case, asked):
        said.append(f"{asked} fits with {_spell_tokens(case, tokens)}.")
    if chosen:
        return [*said, f"{SETTING[chosen]} fits as the rest stands."]
    # the asked method or fewer bits, whose compiler takes more than it saves of a small base
    least = min(KINDS[KINDS.index(asked) :],
                key=lambda kind: case.memory_of(kind, case.micro_batch_tokens).total)  # fmt: skip
    if asked != least and (tokens := _find_tokens(case, least)):
        said.append(f"{SETTING[least]} fits with {_spell_tokens(case, tokens)}.")
    memory = case.memory_of(least, case.micro_batch_tokens)
    room, need = case.room - memory.process, memory.total - memory.process
    if room <= 0:
        process = to_readable_bytes(memory.process)
        return [f"Python and its libraries alone take {process}. Free memory, or take a larger "
                "machine."]  # fmt: skip
    if need > room:
        smaller = to_readable_count(case.facts.parameters * room / need)
        said.append(f"{SETTING[least]} fits a base of about {smaller} parameters as the rest "
                    "stands.")  # fmt: skip
    return said


def _find_tokens(case: PlanCase, kind: str) -> int | None:
    """The largest half, quarter and so on of the micro-batch with which a method fits."""
    tokens = case.micro_batch_tokens // 2
    while tokens >= MIN_TOKENS:
        if case.memory_of(kind, tokens).total <= case.room:
            return tokens
        tokens //= 2
    return None


def _spell_tokens(case: PlanCase, tokens: int) -> str:
    """The settings that bound a micro-batch, which never splits a row."""
    also = "" if case.longest_row <= tokens else " and data.max_tokens"
    return f"train.micro_batch_tokens{also} of {tokens}"
