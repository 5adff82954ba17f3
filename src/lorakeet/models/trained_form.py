"""In how many bits a base was held when adapters were trained on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorakeet.adapters.stored import read_lineage
from lorakeet.base.errors import FileFormatError
from lorakeet.base.method_settings import MethodSettings
from lorakeet.base.quantization_settings import QuantizationSettings

KEY, START = "quantization", "start"


def to_lineage(settings: QuantizationSettings, method: MethodSettings) -> dict[str, Any]:
    """What ``lorakeet.json`` says of the base's form; nothing for a full base.

    With LoftQ's start, the parent's too, the adapter belongs to these bits.
    """
    if not settings.is_on:
        return {}
    start = method.start
    if method.adapter is not None:
        start = read_lineage(Path(method.adapter)).get(START)
    own = {START: start} if start == "loftq" else {}
    return {KEY: settings.describe_form(), **own}


def read_trained_form(folders: Iterable[Path]) -> QuantizationSettings:
    """The form that all adapters were trained on, or a full base where they differ.

    Raises:
        FileFormatError: a lineage file is damaged.
    """
    forms = [_read_form(folder) for folder in folders]
    is_one = bool(forms) and all(form == forms[0] for form in forms)
    return forms[0] if is_one else QuantizationSettings()


def starts_on_error(folder: Path) -> bool:
    """Whether an adapter began on the rounding error of its base (``models.loftq``)."""
    return read_lineage(folder).get(START) == "loftq"


def _read_form(folder: Path) -> QuantizationSettings:
    content: Mapping[str, Any] = read_lineage(folder).get(KEY) or {}
    try:
        return QuantizationSettings.model_validate(content)
    except ValidationError as error:
        raise FileFormatError(
            f"{folder}/lorakeet.json: its 'quantization' is of another format "
            f"({error.errors()[0]['msg']}). Take the file from a copy."
        ) from error
