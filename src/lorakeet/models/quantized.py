"""A base model read straight into 4 or 8 bits, one tensor at a time.

    config.json ──> modules on torch's meta device (no memory)
    safetensors ── one tensor ──> codes + scales ──> QuantizedLinear
                └─ one tensor ──> dtype          ──> norms, embeddings, head

Each file is mapped for one tensor and closed again, so that what the process holds is the
quantised model and one tensor of the file.  A base that bitsandbytes has quantised is read as
it is.  Buffers that no file holds (rotary angles) and a new classification head come from
transformers' own initialisation.

Cost: quantised bytes + the largest tensor, as stored and in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorakeet.adapters.layer import is_conv1d, sizes_of
from lorakeet.adapters.targets import HEAD_NAMES
from lorakeet.base.errors import FileFormatError, NumericsError, RequestError
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.models.quantized_choice import check_blocks, choose_forms
from lorakeet.models.quantized_files import find_quantized, read_quantized
from lorakeet.models.weight_files import TensorFiles, find_renamed, find_sources, find_tensors
from lorakeet.quant.convert import QuantizedForm, quantize_weight, replace_module, with_dtype
from lorakeet.quant.linear import Quantized, QuantizedLinear, Scratch


def fill_quantized(
    model: nn.Module, folder: Path, settings: QuantizationSettings, *, dtype: torch.dtype
) -> None:
    """Puts the weights of a folder into a model on the meta device, quantising as they come.

    Args:
        model: from ``load.build_without_weights``; its linear layers are replaced.
        settings: ignored for what the folder holds quantised already.
        dtype: of everything that is not quantised.

    Raises:
        FileFormatError: weights are missing, damaged or of other shapes.
        ShapeError: some layers cannot be cut into blocks; all are listed.
        NumericsError: a weight holds NaN or infinity.
        RequestError: the patterns select nothing, or mixed widths do not fit the model.
    """
    files = find_tensors(folder)
    sources = find_sources(model, files)
    if len(sources) < len(model.state_dict()):
        sources = find_renamed(model, files) | sources
    ready = _find_ready(sources, files)
    if ready and settings.is_on and {kind for _, kind in ready.values()} != {settings.kind}:
        kinds = ", ".join(sorted({kind for _, kind in ready.values()}))
        raise RequestError(
            f"{folder}: this base is quantised to {kinds} already, and {settings.kind} is asked "
            "for. Leave quantization out, or take the full-precision base."
        )
    forms = {} if ready else choose_forms(model, settings)
    _refuse_missing(model, sources, folder)
    _refuse_misshapen(model, {n: s for n, s in sources.items() if _owner(n) not in ready}, files)
    check_blocks(model, forms)
    reader = _Reader(model, TensorFiles(files, keeps_open=bool(ready)), dtype)
    for path, (source, kind) in ready.items():
        reader.place(path, read_quantized(reader.files, source, kind, dtype))
    for path, form in forms.items():
        reader.place(path, reader.quantize(path, sources[f"{path}.weight"], form))
    reader.read_others(sources)
    initialize_rest(model, dtype)


def _find_ready(sources: Mapping[str, str], files: Mapping[str, Path]) -> dict[str, tuple]:
    """Layer -> (its name in the files, kind), of those that the files hold quantised."""
    found = find_quantized(files)
    return {
        _owner(name): (_owner(source), found[_owner(source)])
        for name, source in sources.items()
        if name.endswith(".weight") and _owner(source) in found
    }


def _owner(name: str) -> str:
    """The module that a tensor's name belongs to."""
    return name.rpartition(".")[0]


class _Reader:
    """Places tensors in a model, one at a time."""

    def __init__(self, model: nn.Module, files: TensorFiles, dtype: torch.dtype) -> None:
        self.model, self.files, self.dtype = model, files, dtype
        self.scratch = Scratch()
        self.levels: Tensor | None = None

    def quantize(self, path: str, source: str, form: QuantizedForm) -> Quantized:
        """A weight of the files in its form, as [out, in]."""
        weight = self.files.read(source)
        if is_conv1d(self.model.get_submodule(path)):
            weight = weight.T
        try:
            return with_dtype(quantize_weight(weight, form), self.dtype)
        except NumericsError as error:
            raise NumericsError(f"{self.files.files[source]}, {source}: {error}") from error

    def place(self, path: str, weight: Quantized) -> None:
        """A quantised layer in the place of a plain one; its bias comes later."""
        plain = self.model.get_submodule(path)
        if tuple(weight.shape) != sizes_of(plain)[::-1]:
            raise FileFormatError(
                f"{path}: the file holds {tuple(weight.shape)} and config.json says "
                f"{sizes_of(plain)[::-1]}. The two belong to different models."
            )
        layer = QuantizedLinear(
            weight, getattr(plain, "bias", None), scratch=self.scratch,
            was_conv1d=is_conv1d(plain),
        )  # fmt: skip
        self._share_levels(layer)
        layer._is_hf_initialized = True  # transformers' mark of what it must not draw anew
        replace_module(self.model, path, layer)

    def _share_levels(self, layer: QuantizedLinear) -> None:
        """One table of 8-bit levels for all layers that have the same."""
        if not layer.is_double:
            return
        if self.levels is None:
            self.levels = layer.scale_levels.clone()
        if torch.equal(layer.scale_levels, self.levels):
            layer.scale_levels = self.levels

    def read_others(self, sources: Mapping[str, str]) -> None:
        """Everything that is not quantised, in the model's dtype; tied names stay tied."""
        alike: dict[int, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if tensor.is_meta and name in sources:
                alike.setdefault(id(tensor), []).append(name)
        for names in alike.values():
            source = sources[names[0]]
            tensor = self.files.read(source)
            kept = self.dtype if tensor.is_floating_point() else tensor.dtype
            # A copy lets go of the file; with files that stay mapped there is nothing to let go.
            set_tensor(self.model, names, tensor.to(kept, copy=not self.files.keeps_open))


def set_tensor(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Puts one tensor, as a parameter or a buffer, under all the names that share it."""
    new: Tensor | None = None
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        is_parameter = leaf in module._parameters
        if new is None:
            frozen = isinstance(module, QuantizedLinear) or not tensor.is_floating_point()
            new = nn.Parameter(tensor, requires_grad=not frozen) if is_parameter else tensor
            new._is_hf_initialized = True
        (module._parameters if is_parameter else module._buffers)[leaf] = new


def initialize_rest(model: Any, dtype: torch.dtype) -> None:
    """Values for what no file holds: buffers that are computed, and a new classification head."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            empty = torch.empty_like(tensor, device="cpu")
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(empty.to(dtype))
            else:
                module._buffers[leaf] = empty
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a new classification head is the same in two loads
        model.initialize_weights()


def _refuse_missing(model: nn.Module, sources: Mapping[str, str], folder: Path) -> None:
    """Only a classifier's new head may be missing."""
    is_classifier = "ForSequenceClassification" in type(model).__name__
    heads = HEAD_NAMES | {"pooler", "summary"}
    lost = [
        name
        for name in model.state_dict()
        if name not in sources and not (is_classifier and heads & set(name.split(".")))
    ]
    if lost:
        raise FileFormatError(
            f"{folder}: {len(lost)} weights are in no file under their names, such as "
            f"{', '.join(lost[:3])}. The files are incomplete, or of a family whose weights are "
            "renamed when they are loaded; load it without quantization."
        )


def _refuse_misshapen(
    model: nn.Module, sources: Mapping[str, str], files: Mapping[str, Path]
) -> None:
    """The files must hold the shapes that config.json says."""
    wrong = []
    expected = {sources[n]: tuple(t.shape) for n, t in model.state_dict().items() if n in sources}
    for path in sorted({files[source] for source in expected}):
        with safe_open(path, framework="pt") as file:
            for source, shape in expected.items():
                if files[source] == path:
                    found = tuple(file.get_slice(source).get_shape())
                    wrong += [f"{source} is {found}, not {shape}"] if found != shape else []
    if wrong:
        raise FileFormatError(
            f"{path.parent}: weights have other shapes than config.json says: "
            f"{'; '.join(wrong[:3])}. The two files belong to different models."
        )
