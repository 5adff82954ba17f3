"""LoRA beside nn.Embedding: the row of a token is E[id] + (alpha / r) B A[:, id]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakeet.adapters.layer import LoraLayer


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
        if self.active not in self.ranks or self.merged is not None:
            return h
        name = self.active
        A, B = self.factors(name)
        change = F.embedding(ids, A.T, padding_idx=self.padding_idx) @ B.T
        if name in self.start_A:
            change = change - F.embedding(ids, self.start_A[name].T) @ self.start_B[name].T
        change = change * self.scales[name] * getattr(self.base_layer, "embed_scale", 1.0)
        if name in self.lora_magnitude_vector:
            gain = self.lora_magnitude_vector[name] / self.norm(name)
            change = (gain - 1) * h + gain * change
        return h + change.to(h.dtype)
