"""The LoRA layer: a frozen weight and a low-rank change beside it.

    h = W0 x + (alpha / r) B A x          A: r x in,  B: out x r,  B starts at zero

W0 is frozen; only A and B are trained, r (in + out) numbers instead of in x out.
As B is zero at the start, the model answers exactly like its base at step 0.
Cost of a forward: 2 r (in + out) FLOP a token beside 2 in x out.  Keeping B A apart
lets one base hold many adapters; merging it in costs nothing at inference.

The wrapper keeps ``weight`` and ``bias`` of the layer it stands for, as models read
them (tied heads, dtype checks).  PEFT's parameter names are used throughout, so
that files need no translation table.

Source: arXiv:2106.09685, section 4.1; A is drawn as in its reference code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakeet.adapters.saved import SavedModule
from lorakeet.adapters.settings import Lora
from lorakeet.base.errors import RequestError

__all__ = [
    "Lora",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "SavedModule",
    "build_layer",
    "is_conv1d",
]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, a Conv1D or an embedding (in = its rows)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    rows, columns = module.weight.shape
    return int(rows), int(columns)


class LoraLayer(nn.Module):
    """A base layer with named adapters, of which one or none is active.

    Args:
        base_layer: frozen; its own object is kept and given back by ``detach``.
    """

    a_name, b_name = "lora_A", "lora_B"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scales: dict[str, float] = {}
        self.ranks: dict[str, int] = {}
        self.dropouts = nn.ModuleDict()
        self.active: str | None = None
        self.merged: str | None = None
        self.kept_weight: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """W0 (or W' while merged), for code that reads it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, never adapted."""
        return getattr(self.base_layer, "bias", None)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]) of an adapter."""
        raise NotImplementedError

    def add(self, name: str, settings: Lora, module: str, seed: int) -> None:
        """A new adapter: A random from its own generator, B zero.

        Raises:
            RequestError: r is larger than the matrix.
        """
        r = settings.rank_of(module)
        num_in, num_out = sizes_of(self.base_layer)
        if r > max(num_in, num_out):
            raise RequestError(
                f"{module}: rank {r} is larger than this {num_out} x {num_in} matrix. Choose a "
                f"rank of at most {min(num_in, num_out)}, or a rank_pattern for this module."
            )
        self.ranks[name], self.scales[name] = r, settings.scale_of(module)
        dropout = nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()
        self.dropouts[name] = dropout.train(self.base_layer.training)  # off in evaluation
        self.create(name, (r, num_in, num_out), seed)

    def create(self, name: str, sizes: tuple[int, int, int], seed: int) -> None:
        """Makes A and B of (r, in, out)."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Forgets an adapter; a merged one stays in the base weight for good."""
        if self.merged == name:
            self.merged, self.kept_weight = None, None
        factors = getattr(self, self.a_name), getattr(self, self.b_name)
        for table in (self.scales, self.ranks, self.dropouts, *factors):
            del table[name]
        if self.active == name:
            self.active = None

    def change(self, name: str) -> Tensor:
        """(alpha / r) B A in float32 and in the layout of the base weight."""
        A, B = (factor.float() for factor in self.factors(name))
        product = self.scales[name] * (B @ A)
        return product.T if self.is_transposed else product

    @property
    def is_transposed(self) -> bool:
        """Whether the base weight is stored as [in, out]."""
        return is_conv1d(self.base_layer)


class LoraLinear(LoraLayer):
    """LoRA beside nn.Linear or Conv1D."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    @property
    def in_features(self) -> int:
        """Columns of W0."""
        return sizes_of(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        """Rows of W0."""
        return sizes_of(self.base_layer)[1]

    def create(self, name: str, sizes: tuple[int, int, int], seed: int) -> None:
        """A uniform with bound 1 / sqrt(in) (Kaiming with a = sqrt(5)), B zero."""
        r, num_in, num_out = sizes
        place = {"device": self.weight.device, "dtype": torch.float32}
        A = nn.utils.skip_init(nn.Linear, num_in, r, bias=False, **place)
        B = nn.utils.skip_init(nn.Linear, r, num_out, bias=False, **place)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(num_in)
        with torch.no_grad():
            A.weight.copy_((torch.rand(r, num_in, generator=generator) * 2 - 1) * bound)
            B.weight.zero_()
        self.lora_A[name], self.lora_B[name] = A, B

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r])."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W0 x + scale B A dropout(x), in the dtype of the base's answer."""
        h = self.base_layer(x, *args, **kwargs)
        if self.active is None or self.merged is not None:
            return h
        name = self.active
        A, B = self.factors(name)
        low = F.linear(self.dropouts[name](x.to(A.dtype)), A)
        return h + (F.linear(low, B) * self.scales[name]).to(h.dtype)


class LoraEmbedding(LoraLayer):
    """LoRA beside nn.Embedding: the row of a token id is E[id] + scale (B A)[:, id]."""

    a_name, b_name = "lora_embedding_A", "lora_embedding_B"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    def create(self, name: str, sizes: tuple[int, int, int], seed: int) -> None:
        """A zero, B normal, as PEFT does for embeddings."""
        r, num_rows, num_out = sizes
        generator = torch.Generator().manual_seed(seed)
        B = torch.randn(num_out, r, generator=generator).to(self.weight.device)
        A = torch.zeros(r, num_rows, device=self.weight.device)
        self.lora_embedding_A[name], self.lora_embedding_B[name] = nn.Parameter(A), nn.Parameter(B)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r, rows], B [width, r])."""
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.base_layer.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return self.base_layer.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        """The row of the padding token, which gets no gradient."""
        return self.base_layer.padding_idx

    @property
    def is_transposed(self) -> bool:
        """An embedding's weight is [rows, width], the transpose of B A."""
        return True

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """E[ids] + scale A[:, ids]^T B^T, times Gemma's factor of its embedding, if any."""
        h = self.base_layer(ids, *args, **kwargs)
        if self.active is None or self.merged is not None:
            return h
        A, B = self.factors(self.active)
        low = F.embedding(ids, A.T, padding_idx=self.padding_idx)
        change = low @ B.T * self.scales[self.active]
        return h + (change * getattr(self.base_layer, "embed_scale", 1.0)).to(h.dtype)


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
