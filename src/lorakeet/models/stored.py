"""A base read as its files hold it, for a training that leaves it as it is.

    config.json ──> modules on torch's meta device (no memory)
    safetensors ── one tensor ──> as stored      ──> linear layers in 16 bits
                └─ one tensor ──> float32        ──> everything else, the two ends among it

transformers widens the whole base before ``models.narrow`` puts it back into 16 bits: 4 bytes a
weight and the mapped file beside them, more than a step takes afterwards.  Read so, the base is
never wide.  What it answers is the same, bit for bit, once ``narrow_frozen`` has run.

Cost: the stored bytes, those of the embedding and the head twice, and one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.base.errors import FileFormatError
from lorakeet.models.quantized import initialize_rest, set_tensor
from lorakeet.models.weight_files import TensorFiles, find_renamed, find_sources, find_tensors
from lorakeet.quant.narrow import NARROW


def fill_as_stored(model: Any, folder: Path) -> bool:
    """Puts the weights of a folder into a model on the meta device.

    Args:
        model: from ``load.build_without_weights`` in float32.

    Returns:
        False where transformers' own loader must be asked: weights are missing, damaged, of
        other shapes or under names that only it knows.  The model is of no use then.
    """
    try:
        files = find_tensors(folder)
        sources = find_sources(model, files)
        if len(sources) < len(model.state_dict()):
            sources = find_renamed(model, files) | sources
        return not set(model.state_dict()) - set(sources) and _fill(model, sources, files)
    except FileFormatError:
        return False


def _fill(model: Any, sources: Mapping[str, str], files: Mapping[str, Path]) -> bool:
    """Whether all tensors have the shapes that the model asks for."""
    reader = TensorFiles(files)
    head = model.get_output_embeddings()
    linear = [each for each in model.modules() if type(each) is nn.Linear and each is not head]
    kept = {id(each.weight) for each in linear}
    tied: dict[Tensor, list[str]] = {}  # by identity, as tensors hash
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(tensor, []).append(name)
    for expected, names in tied.items():
        tensor = reader.read(sources[names[0]])
        if tensor.shape != expected.shape:
            return False
        is_kept = id(expected) in kept and tensor.dtype in NARROW
        dtype = tensor.dtype if is_kept else expected.dtype
        set_tensor(model, names, tensor.to(dtype, copy=True))  # lets go of the file
    initialize_rest(model, torch.float32)
    return True
