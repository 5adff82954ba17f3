"""The section ``quantization`` of a recipe: in how many bits the frozen base is held."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import model_validator

from lorakeet.base.errors import RequestError
from lorakeet.base.section import Names, Section, setting

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
QuantizationKind = Literal["none", "nf4", "fp4", "int8", "mixed"]
BOTH_INT8 = "int8-activations"
_WIDTH = re.compile(r"(none|int8)|(nf4|fp4)(?:/([0-9]+))?")


class QuantizationSettings(Section):
    """In how many bits the frozen base is held; with method.kind lora this is QLoRA."""

    kind: QuantizationKind = setting(
        "none",
        "nf4 holds a weight in 4 bits, int8 in 8; mixed gives each layer its own; none keeps 16 "
        "or 32",
        why="16 bits first: rounding costs a little quality, so 4 only where memory needs it",
    )
    block_size: int = setting(
        64, "weights of nf4 and fp4 that share a scale", why="the paper's (arXiv:2305.14314)"
    )
    double: bool = setting(
        True, "nf4 and fp4: scales in 8 bits too", why="0.37 bit a weight for no measured loss"
    )
    include: str | Names = setting(
        "all-linear", "layers in few bits: all-linear (not the head), names, or an expression"
    )
    exclude: str | Names = setting(
        (), "layers that keep their bits: names, or an expression; a name covers what is inside"
    )
    activations: Literal["full", "int8"] = setting(
        "full",
        "int8 rounds the inputs of int8 layers too, row by row; to serve and evaluate only",
        why="weights alone in 8 bits keep the answers closer",
    )
    bits_per_weight: float = setting(
        5.0, "mixed: the mean over the layers in few bits, scales included", gt=4, le=16
    )
    calibration_rows: int = setting(
        32,
        "mixed: training rows by which the layers are ranked",
        why="the cost of a layer is then known to a quarter: sqrt(2 / 32)",
        ge=1,
    )
    widths: dict[str, str] = setting(
        {},
        "mixed: layer -> none, int8, nf4 or nf4/BLOCK; measured by train when empty",
    )
    cache: str = setting(
        "auto",
        "a folder that keeps the quantised base, so that the next load takes seconds; or none",
        why="auto keeps bases above 1 GB in the user's cache folder",
        min_length=1,
    )

    @model_validator(mode="after")
    def _check(self) -> QuantizationSettings:
        problems = []
        if self.block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            problems.append(f"block_size is {self.block_size}; known are {known}")
        for name in ("include", "exclude"):
            if isinstance(value := getattr(self, name), str):
                try:
                    re.compile(value)
                except re.error as error:
                    problems.append(f"{name} '{value}' is not a regular expression ({error})")
        wrong = [f"{name}: {width}" for name, width in self.widths.items() if not is_width(width)]
        if wrong:
            problems.append(
                f"widths holds {', '.join(wrong[:3])}; known are none, int8, nf4, fp4, and nf4/K "
                "with a known block size K"
            )
        if self.activations == "int8" and self.kind not in ("int8", "mixed"):
            problems.append(f"activations int8 needs kind int8, and kind is {self.kind}")
        if self.widths and self.kind != "mixed":
            problems.append(f"widths belong to kind mixed, and kind is {self.kind}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def is_on(self) -> bool:
        """Whether anything is quantised."""
        return self.kind != "none"

    def describe_form(self) -> dict[str, Any]:
        """What the held weights depend on, as plain JSON.

        >>> sorted(QuantizationSettings(kind="int8").describe_form())
        ['block_size', 'double', 'exclude', 'include', 'kind']
        """
        beside = {"cache", "calibration_rows", "activations"}
        if self.kind != "mixed":
            beside |= {"bits_per_weight", "widths"}
        return self.model_dump(mode="json", exclude=beside)


def is_width(width: str) -> bool:
    """Whether a text names the form of a layer, such as ``int8`` or ``nf4/256``.

    >>> [is_width(width) for width in ("none", "int8", "nf4/256", "nf4/7", "int4")]
    [True, True, True, False, False]
    """
    found = _WIDTH.fullmatch(width)
    return bool(found) and (found[3] is None or int(found[3]) in BLOCK_SIZES)


def to_quantization(asked: QuantizationSettings | str | None) -> QuantizationSettings | None:
    """Settings of a kind's name; settings and None as they are.

    ``int8-activations`` is int8 whose inputs are rounded too.

    >>> to_quantization("nf4").block_size
    64
    >>> to_quantization("int8-activations").activations
    'int8'

    Raises:
        RequestError: an unknown kind.
    """
    if not isinstance(asked, str):
        return asked
    if asked == BOTH_INT8:
        return QuantizationSettings(kind="int8", activations="int8")
    if asked not in (kinds := get_args(QuantizationKind)):
        raise RequestError(
            f"quantization is '{asked}'; known are {', '.join((*kinds, BOTH_INT8))}."
        )
    return QuantizationSettings(kind=asked)
