"""What all sections of a recipe share: strictness, and a reason for each default."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


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


def to_names(value: Any) -> Any:
    """A YAML list as the tuple that a frozen record needs."""
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(to_names)]
