"""The LoRA layer: a frozen weight and a low-rank change beside it.

    h = W0 x + (alpha / r) B A x          A: r x in,  B: out x r,  B starts at zero

W0 is frozen; only A and B are trained, r (in + out) numbers instead of in x out.
As B is zero at the start, the model answers exactly like its base at step 0.
Cost of a forward: 2 r (in + out) FLOP a token beside 2 in x out.  Keeping B A apart
lets one base hold many adapters; merging it in costs nothing at inference.

DoRA gives each output its own trained magnitude m beside the direction V:

    W' = m V / ||V||_c        V = W0 + (alpha / r) B A        m = ||W0||_c at the start

||V||_c, the norm of each row of V as [out, in], is no part of the gradient (section 4.3).

The wrapper keeps ``weight`` and ``bias`` of the layer it stands for, as models read
them (tied heads, dtype checks).  PEFT's parameter names are used throughout, so
that files need no translation table.

Source: LoRA, arXiv:2106.09685, section 4.1; A is drawn as in its reference code.
DoRA, arXiv:2402.09353, sections 4.1 to 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakeet.adapters.bias import bias_in_use
from lorakeet.adapters.saved import SavedModule
from lorakeet.adapters.settings import PISSA_STARTS, Lora
from lorakeet.adapters.start import principal_factors
from lorakeet.adapters.vera import start_vectors
from lorakeet.quant.linear import QuantizedLinear

__all__ = ["Lora", "LoraLayer", "SavedModule", "is_conv1d", "is_linear", "sizes_of"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer: torch's, GPT-2's or a quantised one."""
    return isinstance(module, (nn.Linear, QuantizedLinear)) or (
        isinstance(module, nn.Module) and is_conv1d(module)
    )


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, a Conv1D, a convolution (in h w) or an embedding (rows)."""
    if isinstance(module, (nn.Linear, QuantizedLinear)):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv2d):
        return module.weight[0].numel(), module.out_channels
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
        self.lora_E = nn.ParameterDict()  # AdaLoRA's singular values [r, 1]
        self.lora_magnitude_vector = nn.ParameterDict()  # DoRA's m [out]
        self.trained_bias = nn.ParameterDict()
        self.start_A = nn.ParameterDict()  # PiSSA's A0 and B0, never trained
        self.start_B = nn.ParameterDict()
        self.vera_lambda_d = nn.ParameterDict()  # VeRA's d [r] and b [out]
        self.vera_lambda_b = nn.ParameterDict()
        self.vera_A = nn.ParameterDict()  # and its A and B, which all layers share
        self.vera_B = nn.ParameterDict()
        self.active: str | None = None
        self.merged: str | None = None
        self.kept_weight: Tensor | None = None
        self.kept_bias: Tensor | None = None

    @property
    def names(self) -> set[str]:
        """The adapters that hold something here, if only a bias."""
        return {*self.ranks, *self.trained_bias.keys()}

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out) of the base layer."""
        return sizes_of(self.base_layer)

    @property
    def weight(self) -> Tensor:
        """W0 (or W' while merged), for code that reads it."""
        return self.base_layer.weight

    @property
    def device(self) -> torch.device:
        """Where the base weight lies."""
        is_quantized = isinstance(self.base_layer, QuantizedLinear)
        return (self.base_layer.codes if is_quantized else self.base_layer.weight).device

    @property
    def bias(self) -> Tensor | None:
        """The bias in use: the base layer's, or the active adapter's own."""
        return bias_in_use(self)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]) of an adapter."""
        raise NotImplementedError

    def add(self, name: str, settings: Lora, module: str, seed: int) -> None:
        """A new adapter that leaves the answers as they are.

        A is random from its own generator and B zero, or both start as PiSSA's.
        """
        r = settings.rank_of(module)
        num_in, num_out = self.sizes
        self.ranks[name], self.scales[name] = r, settings.scale_of(module)
        dropout = nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()
        self.dropouts[name] = dropout.train(self.base_layer.training)  # off in evaluation
        if settings.vera is None:
            self.create(name, (r, num_in, num_out), seed)
        else:
            start_vectors(self, name, r, num_out)
        if settings.adalora is not None:
            self._start_triplets(name, seed)
        if settings.start in PISSA_STARTS:
            A0, B0 = principal_factors(
                self.base_matrix(), r, self.scales[name], start=settings.start, seed=seed
            )
            for factor, start in zip(self.factors(name), (A0, B0), strict=True):
                factor.data.copy_(start)
            self.start_A[name] = nn.Parameter(A0, requires_grad=False)
            self.start_B[name] = nn.Parameter(B0, requires_grad=False)
        if settings.dora:
            self.lora_magnitude_vector[name] = nn.Parameter(self.to_magnitude(self.norm(name)))

    def to_magnitude(self, norm: Tensor) -> Tensor:
        """DoRA's m of the norms [out], in the shape that it is kept in."""
        return norm

    def create(self, name: str, sizes: tuple[int, int, int], seed: int) -> None:
        """Makes A and B of (r, in, out)."""
        raise NotImplementedError

    def _start_triplets(self, name: str, seed: int) -> None:
        """AdaLoRA's start: P and Q normal with deviation 0.02, Lambda zero, as in PEFT."""
        generator = torch.Generator().manual_seed(seed)
        for factor in self.factors(name):
            factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.02)
        E = torch.zeros(self.ranks[name], 1, device=self.device)
        self.lora_E[name] = nn.Parameter(E)

    def remove(self, name: str) -> None:
        """Forgets an adapter; a merged one stays in the base weight for good."""
        if self.merged == name:
            self.merged, self.kept_weight, self.kept_bias = None, None, None
        tables = (self.scales, self.ranks, self.dropouts, *self.trained_tables())
        for table in (*tables, self.start_A, self.start_B, self.vera_A, self.vera_B):
            if name in table:
                del table[name]
        if self.active == name:
            self.active = None

    def trained_tables(self) -> tuple[nn.Module, ...]:
        """The tables that hold what is trained."""
        factors = getattr(self, self.a_name), getattr(self, self.b_name)
        vectors = self.lora_magnitude_vector, self.vera_lambda_d, self.vera_lambda_b
        return (*factors, self.lora_E, *vectors, self.trained_bias)

    def num_trained(self, name: str) -> int:
        """Trained parameters of an adapter in this layer."""
        held = [table[name] for table in self.trained_tables() if name in table]
        return sum(p.numel() for each in held for p in _parameters_of(each))

    def plain_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A', B') of the plain LoRA that is equal, without a gradient.

        PiSSA's are [A; A0] and [B, -B0]; AdaLoRA's are Lambda Q and P where Lambda is not 0.
        """
        A, B = (factor.detach().float() for factor in self.factors(name))
        if name in self.lora_E:
            E = self.lora_E[name].detach().float()
            kept = E[:, 0] != 0
            return (A * E)[kept], B[:, kept]
        if name in self.start_A:
            return torch.cat([A, self.start_A[name]]), torch.cat([B, -self.start_B[name]], dim=1)
        return A, B

    def plain_rank(self, name: str) -> int:
        """r of ``plain_factors``."""
        if name in self.lora_E:
            return int((self.lora_E[name] != 0).sum())
        return self.ranks[name] * (2 if name in self.start_A else 1)

    def is_plain(self, name: str) -> bool:
        """Whether the adapter is plain LoRA as it stands."""
        return name not in self.lora_E and name not in self.start_A

    def base_matrix(self) -> Tensor:
        """W0 in float32 as [out, in], whatever the layout or the bits of the base."""
        W0 = self.base_layer.weight.detach().float().flatten(1)
        return W0.T if self.is_transposed else W0

    def direction(self, name: str) -> Tensor:
        """V = W0 + (alpha / r) B A in float32 as [out, in], without a gradient."""
        A, B = (factor.detach().float() for factor in self.factors(name))
        product = B @ (A * self.lora_E[name].detach() if name in self.lora_E else A)
        if name in self.start_A:  # apart from B A, so that step 0 is exact
            product = product - self.start_B[name] @ self.start_A[name]
        return self.base_matrix() + self.scales[name] * product

    def norm(self, name: str) -> Tensor:
        """||V||_c, float32 [out]."""
        return torch.linalg.vector_norm(self.direction(name), dim=1)

    def new_weight(self, name: str) -> Tensor:
        """W' in float32 and in the layout of the base weight, without a gradient."""
        new = self.direction(name)
        if name in self.lora_magnitude_vector:
            m = self.lora_magnitude_vector[name].detach().float().flatten()
            new = (m / torch.linalg.vector_norm(new, dim=1))[:, None] * new
        return (new.T if self.is_transposed else new).reshape(self.base_layer.weight.shape)

    def change(self, name: str) -> Tensor:
        """W' - W0 in float32 and in the layout of the base weight."""
        if name in self.lora_magnitude_vector:
            return self.new_weight(name) - self.base_layer.weight.detach().float()
        A, B = self.plain_factors(name)
        product = self.scales[name] * (B @ A)
        return (product.T if self.is_transposed else product).reshape(self.weight.shape)

    @property
    def is_transposed(self) -> bool:
        """Whether the base weight is stored as [in, out]."""
        return is_conv1d(self.base_layer)


def _parameters_of(held: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    """The parameters of a module, or the one itself."""
    return [held] if isinstance(held, nn.Parameter) else list(held.parameters())
