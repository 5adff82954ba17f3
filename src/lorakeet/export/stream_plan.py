"""Which tensors a merged model's files hold, and where each of them comes from.

The names and sizes are those of the model built without weights; what the base's files
call them decides whether a merge can be streamed at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorakeet.adapters.files import read_adapter_config
from lorakeet.adapters.layer import is_conv1d
from lorakeet.adapters.peft_config import VERA
from lorakeet.adapters.settings import NO_BIAS
from lorakeet.adapters.stored import StoredAdapter, StoredLayer, read_stored
from lorakeet.adapters.targets import ends_with
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.models.quantized_choice import choose_forms
from lorakeet.models.weight_files import find_sources, find_tensors
from lorakeet.quant.convert import QuantizedForm

_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of the output and where it comes from.

    Args:
        source: its name in the base's files; None where the adapter brings it.
        layer: the factors whose change is added, or None.
        is_transposed: whether the weight is the transpose of B A.
        saved: the adapter's own trained tensor, which stands for the base's.
        form: that the base's weight is rounded to before the sum, as it was in training.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str | None
    layer: StoredLayer | None = None
    is_transposed: bool = False
    saved: Tensor | None = None
    form: QuantizedForm | None = None

    @property
    def num_bytes(self) -> int:
        """In the output."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """All pieces in the model's order, and why a stream is not possible, if it is not.

    Args:
        files: tensor of the base -> the file that holds it.
        obstacles: one sentence each; empty when the pieces can be written.
    """

    pieces: tuple[Piece, ...]
    files: dict[str, Path]
    obstacles: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Of all output tensors."""
        return sum(piece.num_bytes for piece in self.pieces)


def plan_stream(
    model: nn.Module,
    base_folder: Path,
    adapter_folder: Path,
    dtype: torch.dtype,
    *,
    form: QuantizationSettings | None = None,
) -> StreamPlan:
    """What would be written, from names and sizes alone.

    Args:
        model: the base on torch's meta device; its head is untied where the adapter needs that.
        dtype: of all floating tensors in the output.
        form: how the base was held in training; its rounded weights are then merged into.

    Raises:
        FileFormatError: the adapter is damaged.
    """
    if read_adapter_config(adapter_folder).get("target_parameters"):
        told = "the adapter changes stacked experts, which the base's files may keep one by one"
        return StreamPlan(pieces=(), files={}, obstacles=(told,))
    if read_adapter_config(adapter_folder).get("peft_type") == VERA:
        told = "VeRA's layers take their parts of A and B from the loaded model"
        return StreamPlan(pieces=(), files={}, obstacles=(told,))
    adapter = read_stored(adapter_folder)
    files = find_tensors(base_folder)
    obstacles = [f"the adapter is more than s B A: {note}" for note in adapter.beside_factors]
    saved = _find_saved(adapter, files, obstacles)
    sources = find_sources(model, files)
    rounded = choose_forms(model, form) if form else {}
    _untie(model, adapter, saved)
    changes = {f"{module}.weight": module for module in adapter.layers}
    pieces = []
    for name, tensor in _stored_tensors(model):
        layer = adapter.layers.get(changes.get(name, ""))
        owner = name.rpartition(".")[0]
        is_turned = is_conv1d(model.get_submodule(owner)) and name.endswith(".weight")
        is_turned = is_turned or (layer is not None and layer.is_embedding)
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        pieces.append(
            Piece(
                name=name, shape=tuple(tensor.shape), dtype=kept, source=sources.get(name),
                layer=layer, is_transposed=is_turned, saved=saved.get(name),
                form=rounded.get(owner) if name == f"{owner}.weight" else None,
            )
        )  # fmt: skip
    names = {piece.name for piece in pieces}
    lost = [p.name for p in pieces if p.source is None and p.saved is None]
    obstacles += [f"{name} is in no file of the base" for name in lost]
    odd = sorted((changes.keys() | saved.keys()) - names)
    obstacles += [f"the adapter changes {name}, which this model does not hold" for name in odd]
    wide = [module for module, layer in adapter.layers.items() if layer.A.dim() != 2]
    obstacles += [f"{module} is a convolution" for module in wide]
    obstacles += _find_misshapen(pieces, files)
    return StreamPlan(pieces=tuple(pieces), files=files, obstacles=tuple(obstacles))


def _find_misshapen(pieces: Sequence[Piece], files: Mapping[str, Path]) -> list[str]:
    """Tensors whose shape in the base's files is not the model's."""
    found = []
    for path in sorted({files[piece.source] for piece in pieces if piece.source}):
        with safe_open(path, framework="pt") as file:
            for piece in pieces:
                if piece.source and files[piece.source] == path:
                    shape = tuple(file.get_slice(piece.source).get_shape())
                    if shape != piece.shape:
                        found.append(f"{piece.source} is {shape}, the model's is {piece.shape}")
    return found


def _find_saved(
    adapter: StoredAdapter, files: Mapping[str, Path], obstacles: list[str]
) -> dict[str, Tensor]:
    """The adapter's own tensors under the model's names, less mere copies of the base's."""
    keys, saved = adapter.settings.modules_to_save, {}
    for key, tensor in adapter.others.items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if name in files:
            with safe_open(files[name], framework="pt") as file:
                base = file.get_tensor(name)
            if base.shape == tensor.shape and torch.equal(base, tensor.to(base.dtype)):
                continue
        is_bias = name.endswith(".bias") and adapter.settings.bias != NO_BIAS
        if not is_bias and not any(
            ends_with(owner, each) for owner in _owners(name) for each in keys
        ):
            obstacles.append(f"the adapter holds {name}, which is no saved module")
        saved[name] = tensor
    return saved


def _owners(name: str) -> Iterator[str]:
    """The modules around a tensor, from the inside."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _untie(model: nn.Module, adapter: StoredAdapter, saved: Mapping[str, Tensor]) -> None:
    """Gives the head a weight of its own where the adapter changes a shared one."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in ends or ends[0].weight is not ends[1].weight:
        return
    paths = [path for path, module in model.named_modules() if module in ends]
    if any(path in adapter.layers or f"{path}.weight" in saved for path in paths):
        ends[1].weight = nn.Parameter(torch.empty_like(ends[1].weight), requires_grad=False)
        model.config.tie_word_embeddings = False


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a file of this model holds: parameters once each, and persistent buffers."""
    parameters = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in parameters or name not in every:
            yield name, tensor
