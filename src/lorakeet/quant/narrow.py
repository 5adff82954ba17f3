"""A frozen linear layer that keeps its weight in 16 bits and multiplies in 32, without loss.

A checkpoint in bfloat16 that is widened to float32 carries 16 zero bits a weight. Here they
are left out, and put back for one product:

    W = float32(codes)            into a scratch that all layers share
    y = x W^T + b                 backward: dx = dy W, with W put back again

Only a weight whose 16-bit form gives the same float32 numbers is held so; so answers and
gradients are those of the wide layer, bit for bit.

Cost: 2 bytes a weight instead of 4, and one scratch of the largest layer; putting W back
moves 6 bytes a weight, 1 to 2 % of a product of 1,024 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakeet.quant.linear import QuantizedLinear, Scratch, new_brief

BLOCK_ROWS = 4096  # of a head: 16 MB at 1,024 numbers a row
NARROW = (torch.bfloat16, torch.float16)


def to_narrow(weight: Tensor) -> Tensor | None:
    """The same numbers in 16 bits, or None where some need more.

    >>> to_narrow(torch.tensor([0.5, 3.0])).dtype, to_narrow(torch.tensor([0.1]))
    (torch.bfloat16, None)
    """
    kept = (weight.detach().to(dtype) for dtype in NARROW)
    return next((codes for codes in kept if _is_same(codes, weight)), None)


def _is_same(codes: Tensor, weight: Tensor) -> bool:
    """Whether 16 bits give the same numbers; compared in blocks, as a table may be large."""
    pairs = zip(codes.split(BLOCK_ROWS), weight.split(BLOCK_ROWS), strict=True)
    return all(torch.equal(some.to(weight.dtype), wide) for some, wide in pairs)


class NarrowLinear(QuantizedLinear):
    """y = x W^T + b with W held in 16 bits.

    Args:
        codes: W [out, in] in bfloat16 or float16.
        bias: [out] or None; kept as it is, frozen.
        scratch: shared with other layers.
        dtype: of W as the layer computes with it.
    """

    def __init__(
        self, codes: Tensor, bias: Tensor | None, *, scratch: Scratch, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        self.kind, self.dtype, self.was_conv1d = str(codes.dtype)[6:], dtype, False
        self.scratch = scratch
        self.register_buffer("codes", codes)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """W as a new tensor, [out, in] in ``dtype``."""
        return self.codes.to(self.dtype)

    def expand_shared(self, dtype: torch.dtype) -> Tensor:
        """W in the scratch; the next expansion of any layer overwrites it."""
        scratch = self.scratch.take(self.num_weights, dtype, self.codes.device)
        return scratch[: self.num_weights].view(self.codes.shape).copy_(self.codes)

    def multiply(self, x: Tensor) -> Tensor:
        """The product x W^T + b without a graph, [..., out]; no view of another tensor."""
        y = new_brief(x, *x.shape[:-1], self.out_features)
        x_TI, y_TO = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
        W_IO = self.expand_shared(x.dtype).T
        if self.bias is None:
            torch.mm(x_TI, W_IO, out=y_TO)
        else:
            torch.addmm(self.bias.to(x.dtype), x_TI, W_IO, out=y_TO)
        return y


class NarrowHead(NarrowLinear):
    """An output head held in 16 bits; it is put back in blocks, as the whole is large."""

    def expand_shared(self, dtype: torch.dtype) -> Tensor:
        """W as a new tensor, which goes when the product is done."""
        return self.codes.to(dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """The product x W^T + b without a graph, [..., out], block by block of the vocabulary."""
        y = new_brief(x, *x.shape[:-1], self.out_features)
        x_TI, y_TO = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
        for start in range(0, self.out_features, BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            y_TO[:, block] = x_TI @ self.codes[block].to(x.dtype).T
        return y if self.bias is None else y.add_(self.bias.to(x.dtype))


class NarrowEmbedding(nn.Module):
    """Rows of a table held in 16 bits, frozen.

    Args:
        codes: [ids, D] in bfloat16 or float16; a head may hold the same.
        dtype: of the answers.
    """

    def __init__(self, codes: Tensor, padding_idx: int | None, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape
        self.padding_idx, self.dtype = padding_idx, dtype
        self.register_buffer("codes", codes)

    @property
    def weight(self) -> Tensor:
        """The table as a new tensor, [ids, D] in ``dtype``."""
        return self.codes.to(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of ids, [..., D]."""
        return nn.functional.embedding(ids, self.codes, self.padding_idx).to(self.dtype)
