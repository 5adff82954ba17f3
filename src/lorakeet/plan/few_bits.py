"""What a base in few bits weighs: the layers that ``quantization`` chooses, and their scales.

Names are matched as ``models.quantized_choice`` matches them on the built model, over the
names that ``plan.model_facts`` lists.  For a matrix of n weights in o rows

    nf4, fp4    n / 2 + scales: n / K + 4 n / (256 K) in two steps, else 4 n / K
    int8        n + 4 o

and 0.516 bytes a weight at K = 64 with double quantisation.  Biases keep their bytes.

Source: arXiv:2305.14314, section 3; arXiv:2208.07339, section 2.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.plan.model_facts import ModelFacts
from lorakeet.plan.parts import Part

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class QuantizedCount:
    """The weights that are held in few bits.

    Args:
        parameters: entries of the chosen matrices.
        num_bytes: of their codes and scales.
        largest: entries of the largest one, which is expanded into a scratch.
        num_layers: chosen layers; 0 where the patterns match nothing.
    """

    parameters: int
    num_bytes: int
    largest: int
    num_layers: int


def count_quantized(facts: ModelFacts, settings: QuantizationSettings, kind: str) -> QuantizedCount:
    """The layers that a base in few bits holds so, and their bytes.

    Args:
        settings: patterns and blocks; its own kind does not matter.
        kind: ``lora-8bit`` or ``qlora``.
    """
    chosen = [part for part, name in _linear_layers(facts) if _is_chosen(part, name, settings)]
    sizes = [part.num_in * part.num_out for part in chosen]
    if kind == "lora-8bit":
        held = sum(sizes) + 4 * sum(part.num_out for part in chosen)
    else:
        held = count_four_bit_bytes(settings) * sum(sizes)
    return QuantizedCount(
        parameters=sum(sizes), num_bytes=int(held), largest=max(sizes, default=0),
        num_layers=len(chosen),
    )  # fmt: skip


def count_four_bit_bytes(settings: QuantizationSettings) -> float:
    """Bytes of a weight in 4 bits: half a byte, and its share of the scales; or of a mix.

    >>> round(count_four_bit_bytes(QuantizationSettings()), 4)
    0.5159
    """
    if settings.kind == "mixed":
        return settings.bits_per_weight / 8
    K = settings.block_size
    return 0.5 + (1 / K + 4 / (256 * K) if settings.double else 4 / K)


def _linear_layers(facts: ModelFacts) -> Iterator[tuple[Part, str]]:
    """Layers and heads with a weight of their own; a tied head is looked up in full precision."""
    for part in facts.parts:
        if part.kind in ("linear", "head") and not part.num_tied:
            yield from ((part, name) for name in part.names())


def _is_chosen(part: Part, name: str, settings: QuantizationSettings) -> bool:
    if settings.exclude and _matches(name, settings.exclude):
        return False
    if settings.include == ALL_LINEAR:
        return part.kind == "linear"
    return _matches(name, settings.include)


def _matches(name: str, pattern: str | tuple[str, ...]) -> bool:
    """A name whose parts stand anywhere in the full name, or an expression over all of it."""
    if isinstance(pattern, str):
        return bool(re.fullmatch(pattern, name)) or _matches(name, (pattern,))
    return any(f".{key}." in f".{name}." for key in pattern)
