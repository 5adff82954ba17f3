"""The wrapper that fits a base layer."""

from __future__ import annotations

from torch import nn

from lorakeet.adapters.embedding import LoraEmbedding
from lorakeet.adapters.layer import LoraLayer, is_conv1d
from lorakeet.adapters.linear import LoraLinear
from lorakeet.base.errors import RequestError


def build_layer(module: nn.Module) -> LoraLayer:
    """The wrapper that fits a base layer.

    Raises:
        RequestError: the module is neither linear nor an embedding.
    """
    if isinstance(module, nn.Embedding):
        return LoraEmbedding(module)
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return LoraLinear(module)
    raise RequestError(
        f"{type(module).__name__} cannot carry a LoRA adapter; linear layers, Conv1D and "
        "embeddings can. Name it in modules_to_save to train it in full."
    )
