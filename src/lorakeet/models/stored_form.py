"""Whether the files of a base hold it quantised, told from config.json without torch."""

from __future__ import annotations

from pathlib import Path

from lorakeet.base.errors import FileFormatError
from lorakeet.base.run_folder import read_json


def is_prequantized(folder: Path) -> bool:
    """Whether a base is quantised already.

    Raises:
        FileFormatError: by another method than bitsandbytes.
    """
    found = read_json(folder / "config.json").get("quantization_config")
    if not found:
        return False
    method = found.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise FileFormatError(
            f"{folder}: the weights are quantised by '{method}', which is not read here. Needed is "
            "the full-precision model, or one that bitsandbytes quantised."
        )
    return True
