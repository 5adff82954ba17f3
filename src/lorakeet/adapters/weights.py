"""The tensors of an adapter folder: one safetensors file, or shards with an index.

adapter_model.safetensors                      what PEFT and Lorakeet write
adapter_model.safetensors.index.json           tensor -> file, as transformers writes it
adapter_model-00001-of-00002.safetensors       for an adapter above its shard size
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorakeet.base.errors import FileFormatError
from lorakeet.base.run_folder import read_json

WEIGHTS = "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the tensors; empty where there are none.

    Raises:
        FileFormatError: the index is none, or names files that are not there.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    names = sorted({Path(file).name for file in _read_places(folder).values()})
    if lost := [name for name in names if not (folder / name).is_file()]:
        raise FileFormatError(
            f"{folder}: {INDEX} names {', '.join(lost)}, and there is no such file. Fetch the "
            "adapter again."
        )
    return names


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of an adapter.

    Raises:
        FileFormatError: a file is damaged, or the shards do not hold what the index says.
    """
    tensors: dict[str, Tensor] = {}
    for name in weight_files(folder):
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError) as error:
            raise FileFormatError(
                f"{folder / name}: not a whole safetensors file ({error})."
            ) from error
    if not (folder / WEIGHTS).is_file() and tensors.keys() != _read_places(folder).keys():
        odd = sorted(tensors.keys() ^ _read_places(folder).keys())
        raise FileFormatError(
            f"{folder}: {INDEX} and its shards differ in {len(odd)} tensors, such as {odd[0]}. "
            "Fetch the adapter again."
        )
    return tensors


def _read_places(folder: Path) -> dict[str, str]:
    """Tensor -> file, by the index."""
    content = read_json(folder / INDEX)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise FileFormatError(f"{folder / INDEX}: it holds no weight_map. Fetch the adapter again.")
    return places
