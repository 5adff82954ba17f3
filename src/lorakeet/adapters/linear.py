"""LoRA beside nn.Linear or GPT-2's Conv1D: h = W0 x + (alpha / r) B A dropout(x)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakeet.adapters.bias import call_base
from lorakeet.adapters.fused import LoraProduct, can_fuse
from lorakeet.adapters.layer import LoraLayer, is_conv1d, sizes_of
from lorakeet.adapters.vera import scaled_projections
from lorakeet.quant.linear import QuantizedLinear


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """The parts of h = W0 x + b + s B A x.

    Args:
        base: W0 as [out, in], or the layer that expands it.
    """

    base: Tensor | QuantizedLinear
    b: Tensor | None
    A: Tensor
    B: Tensor
    s: float


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
        place = {"device": self.device, "dtype": torch.float32}
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
        if name in self.vera_A:
            return scaled_projections(self, name)
        return self.lora_A[name].weight, self.lora_B[name].weight

    def plain_part(self, x: Tensor) -> Plain | None:
        """What h is made of, where it is W0 x + b + s B A x and nothing else, seen or changed."""
        name = self.active
        is_seen = self._forward_hooks or self._forward_pre_hooks
        if name not in self.ranks or self.merged is not None or is_seen:
            return None
        if not self._is_plain(name, x):
            return None
        A, B = self.factors(name)
        return Plain(base=self._base(), b=self.bias, A=A, B=B, s=self.scales[name])

    def _is_plain(self, name: str, x: Tensor) -> bool:
        """Whether h is W0 x + b + s B A x and nothing else, which one function computes."""
        has_form = name in self.lora_E or name in self.start_A or name in self.lora_magnitude_vector
        drops = self.dropouts[name].training and isinstance(self.dropouts[name], nn.Dropout)
        is_known = type(self.base_layer) is nn.Linear or isinstance(
            self.base_layer, QuantizedLinear
        )
        return (
            (is_known or is_conv1d(self.base_layer))
            and not (has_form or drops or self.base_layer._forward_hooks)
            and can_fuse(x, self._base(), self.bias, self.factors(name)[0])
        )

    def _base(self) -> Tensor | QuantizedLinear:
        """W0 as [out, in], or the layer that expands it."""
        if isinstance(self.base_layer, QuantizedLinear):
            return self.base_layer
        return self.weight.T if self.is_transposed else self.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W0 x + scale B A dropout(x), in the dtype of the base's answer."""
        name = self.active
        if name not in self.ranks or self.merged is not None:
            return call_base(self, (x, *args), kwargs)
        if self._is_plain(name, x):
            A, B = self.factors(name)
            return LoraProduct.apply(x, self._base(), self.bias, A, B, self.scales[name])
        h = call_base(self, (x, *args), kwargs)
        A, B = self.factors(name)
        x = x.to(A.dtype)
        dropped = self.dropouts[name](x)
        low = F.linear(dropped, A)
        if name in self.lora_E:
            low = low * self.lora_E[name][:, 0]
        change = F.linear(low, B)
        if name in self.start_A:
            change = change - F.linear(F.linear(x, self.start_A[name]), self.start_B[name])
        change = change * self.scales[name]
        if name not in self.lora_magnitude_vector:
            return h + change.to(h.dtype)
        gain = self.lora_magnitude_vector[name] / self.norm(name)
        if dropped is x:
            direct = h if self.bias is None else h - self.bias
        else:
            direct = F.linear(dropped, self.base_matrix())
        return h + ((gain - 1) * direct + gain * change).to(h.dtype)
