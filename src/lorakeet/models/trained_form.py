"""In how many bits a base was held when adapters were trained on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorakeet.adapters.stored import read_lineage
from lorakeet.base.errors import FileFormatError
from lorakeet.base.quantization_settings import QuantizationSettings

KEY = "quantization"


def to_lineage(settings: QuantizationSettings) -> dict[str, Any]:
    """What ``lorakeet.json`` says of the base's form; nothing for a full base."""
    if not settings.is_on:
        return {}
    return {KEY: settings.model_dump(mode="json", exclude={"cache"})}


def read_trained_form(folders: Iterable[Path]) -> QuantizationSettings:
    """The form that all adapters were trained on, or a full base where they differ.

    Raises:
        FileFormatError: a lineage file is damaged.
    """
    forms = {_read_form(folder) for folder in folders}
    return forms.pop() if len(forms) == 1 else QuantizationSettings()


def _read_form(folder: Path) -> QuantizationSettings:
    content: Mapping[str, Any] = read_lineage(folder).get(KEY) or {}
    try:
        return QuantizationSettings.model_validate(content)
    except ValidationError as error:
        raise FileFormatError(
            f"{folder}/lorakeet.json: its 'quantization' is of another format "
            f"({error.errors()[0]['msg']}). Take the file from a copy."
        ) from error
