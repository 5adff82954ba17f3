"""LoRA for experts that are stacked in one parameter: an adapter for each expert.

    W'_e = W_e + (alpha / r) B_e A_e          A_e: r x in,  B_e: out x r,  e = 1 .. E

Mixtral and Qwen-MoE keep W as one parameter [E, out, in] of the module ``experts``, which
calls it in its own way (a loop, or grouped products).  So the module runs unchanged with
W' in the place of W for the length of a call.  Cost: the stack s B A, as large as W, while
the layer works.

One wrapper holds one parameter; a module with two has two, one in the other.  A lies as
[E r, in] and B as [out, r E], PEFT's layout of ``target_parameters``, which PEFT 0.21 reads;
readers of plain LoRA do not.

Source: arXiv:2106.09685, section 4.1, for each expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorakeet.adapters.layer import LoraLayer
from lorakeet.adapters.settings import DEFAULT_START, Lora
from lorakeet.base.errors import RequestError


class LoraExperts(LoraLayer):
    """Adapters of one stacked parameter of a module.

    Args:
        base_layer: the module, or the wrapper of its other parameter.
        parameter_name: such as ``gate_up_proj``.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__(base_layer)
        self.parameter_name = parameter_name
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        inner = self.base_layer
        return inner.owner if isinstance(inner, LoraExperts) else inner

    @property
    def weight(self) -> Tensor:
        """W [E, out, in], or [E, in, out] where the module says so."""
        return getattr(self.owner, self.parameter_name)

    @property
    def bias(self) -> None:
        """Experts' biases are not adapted."""
        return None

    @property
    def is_transposed(self) -> bool:
        """Whether the base weight is stored as [E, in, out]."""
        return bool(getattr(self.owner, "is_transposed", False))

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out) of one expert."""
        return stacked_sizes(self.weight, is_transposed=self.is_transposed)

    def add(self, name: str, settings: Lora, module: str, seed: int) -> None:
        """A new adapter of every expert that leaves the answers as they are.

        Raises:
            RequestError: an option that acts on x or on single matrices.
        """
        odd = {
            "dropout": settings.dropout > 0,
            "dora": settings.dora,
            "adalora": settings.adalora is not None,
            "start": settings.start != DEFAULT_START,
            "vera": settings.vera is not None,
        }
        if found := [key for key in odd if odd[key]]:
            raise RequestError(
                f"{module}: {', '.join(found)} cannot be used on stacked experts, which are "
                "adapted through their weight. Leave it out, or the experts out of targets."
            )
        r, (num_in, num_out) = settings.rank_of(module), self.sizes
        self.ranks[name], self.scales[name] = r, settings.scale_of(module)
        self.create(name, (r, num_in, num_out), seed)

    def create(self, name: str, sizes: tuple[int, int, int], seed: int) -> None:
        """A uniform with bound 1 / sqrt(in), B zero."""
        r, num_in, num_out = sizes
        rows, place = r * len(self.weight), {"device": self.weight.device, "dtype": torch.float32}
        A = nn.utils.skip_init(nn.Linear, num_in, rows, bias=False, **place)
        B = nn.utils.skip_init(nn.Linear, rows, num_out, bias=False, **place)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            drawn = torch.rand(rows, num_in, generator=generator)
            A.weight.copy_((drawn * 2 - 1) / math.sqrt(num_in))
            B.weight.zero_()
        self.lora_A[name], self.lora_B[name] = A, B

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [E, r, in], B [E, out, r])."""
        A, B, E = self.lora_A[name].weight, self.lora_B[name].weight, len(self.weight)
        return A.view(E, -1, A.shape[1]), B.view(len(B), -1, E).permute(2, 0, 1)

    def change(self, name: str) -> Tensor:
        """s B_e A_e of all experts, float32 and in the layout of the base weight."""
        A, B = self.factors(name)
        product = self.scales[name] * (B @ A)
        return product.transpose(1, 2) if self.is_transposed else product

    @torch.no_grad()
    def new_weight(self, name: str) -> Tensor:
        """W' in float32 and in the layout of the base weight, without a gradient."""
        return self.weight.float() + self.change(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module answers with W' in the place of W."""
        name = self.active
        if name not in self.ranks or self.merged is not None:
            return self.base_layer(*args, **kwargs)
        new = self.weight + self.change(name).to(self.weight.dtype)
        place = "base_layer." * (self.depth - 1) + self.parameter_name
        return functional_call(self.base_layer, {place: new}, args, kwargs)

    @property
    def depth(self) -> int:
        """Wrappers from here to the module, this one included."""
        return 1 + (self.base_layer.depth if isinstance(self.base_layer, LoraExperts) else 0)


def stacked_sizes(weight: Tensor, *, is_transposed: bool) -> tuple[int, int]:
    """(in, out) of one expert of a stack."""
    rows, columns = weight.shape[1:]
    return (rows, columns) if is_transposed else (columns, rows)


def sizes_of_experts(model: nn.Module, target: str) -> tuple[int, int, int]:
    """(in, out) of one expert of the stacked parameter with a full name, and E."""
    path, _, name = target.rpartition(".")
    module = model.get_submodule(path)
    owner = module.owner if isinstance(module, LoraExperts) else module
    is_transposed = bool(getattr(owner, "is_transposed", False))
    weight = getattr(owner, name)
    return *stacked_sizes(weight, is_transposed=is_transposed), len(weight)


def stacked_parameters(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The stacked parameters that a module holds itself, by full name."""
    owner = module.owner if isinstance(module, LoraExperts) else module
    if isinstance(owner, LoraLayer) or "Experts" not in type(owner).__name__:
        return
    for name, parameter in owner.named_parameters(recurse=False):
        if parameter.dim() == 3:
            yield f"{path}.{name}", parameter


def wrapper_of(model: nn.Module, target: str) -> LoraExperts | None:
    """The wrapper of a stacked parameter by its full name, if there is one."""
    path, _, parameter_name = target.rpartition(".")
    module = model.get_submodule(path)
    while isinstance(module, LoraExperts):
        if module.parameter_name == parameter_name:
            return module
        module = module.base_layer
    return None


def is_stacked(model: nn.Module, target: str) -> bool:
    """Whether a full name is that of a stacked parameter."""
    path, _, name = target.rpartition(".")
    try:
        return any(
            found == target for found, _ in stacked_parameters(path, model.get_submodule(path))
        )
    except AttributeError:
        return False


def layer_names(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every wrapper of a model by the full name of what it adapts."""
    for path, module in model.named_modules():
        if isinstance(module, LoraExperts):
            bare = path.replace(".base_layer", "")
            yield f"{bare}.{module.parameter_name}", module
        elif isinstance(module, LoraLayer):
            yield path, module


def file_owner(model: nn.Module, path: str, name: str) -> str:
    """The place of a wrapper in a file: ``.base_layer`` for each outer one of the same adapter."""
    bare = path.replace(".base_layer", "")
    outer, count = model.get_submodule(bare), 0
    inner = model.get_submodule(path)
    while outer is not inner:
        count += name in outer.ranks
        outer = outer.base_layer
    return bare + ".base_layer" * count
