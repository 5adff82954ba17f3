"""Where a model's tensors lie in the safetensors files of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorakeet.base.errors import FileFormatError
from lorakeet.base.run_folder import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, as the index says or from the only file.

    Raises:
        FileFormatError: a file is damaged.
    """
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map", {})
        return {name: folder / Path(file).name for name, file in places.items()}
    if not (folder / SINGLE).is_file():
        return {}
    try:
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    except SafetensorError as error:
        raise FileFormatError(
            f"{folder / SINGLE}: damaged ({error}). Fetch the base again."
        ) from error


def find_sources(model: nn.Module, files: Mapping[str, Path]) -> dict[str, str]:
    """Name in the model -> the name in its files.

    A tied weight may lie under its other name, and all may lack the head of the inner
    model's name, as files do that were saved from the inner model.
    """
    inner = f"{getattr(model, 'base_model_prefix', '')}."
    alike: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        alike.setdefault(id(tensor), []).append(name)
    return {
        name: source
        for own in alike.values()
        for name in own
        if (source := _first(files, (name, *own, *(each.removeprefix(inner) for each in own))))
    }


def find_renamed(model: nn.Module, files: Mapping[str, Path]) -> dict[str, str]:
    """Name in the model -> an older name in its files, by transformers' table of renamings."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [each for each in table if isinstance(each, WeightRenaming)]
    own = model.state_dict()
    prefix = getattr(model, "base_model_prefix", None)
    found = {rename_source_key(name, renamings, [], prefix, own)[0]: name for name in files}
    return {name: source for name, source in found.items() if name in own}


def read_tensor(path: Path, name: str) -> Tensor:
    """A tensor mapped from its file; the file is closed when the tensor is dropped.

    Raises:
        FileFormatError: the file is damaged or does not hold the tensor.
    """
    return TensorFiles({name: path}).read(name)


class TensorFiles:
    """The tensors of several files, mapped as they are asked for.

    Args:
        files: tensor name -> file.
        keeps_open: maps each file once and holds it, for tensors that stay mapped; otherwise
            a file is mapped for one tensor, so that its pages can be given back.
    """

    def __init__(self, files: Mapping[str, Path], *, keeps_open: bool = False) -> None:
        self.files = files
        self.keeps_open = keeps_open
        self._handles: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            FileFormatError: no file holds it, or the file is damaged.
        """
        if name not in self.files:
            raise FileFormatError(f"{name}: this tensor is in no file. Fetch the model again.")
        path = self.files[name]
        try:
            handle = self._handles.get(path) or safe_open(path, framework="pt")
            if self.keeps_open:
                self._handles[path] = handle
            return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FileFormatError(
                f"{path}: damaged, or without the tensor {name} ({error}). Fetch the base again."
            ) from error


def _first(files: Mapping[str, Path], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in files), None)
