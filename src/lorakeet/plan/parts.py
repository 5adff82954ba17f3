"""The parts of a model: every module that holds parameters, with its name and its sizes.

A family of models lists its parts once; from the list follow the number of parameters,
what an adapter adds and what a token costs, so these three cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

ADAPTABLE = ("linear", "head", "embedding")  # the kinds of modules that LoRA can wrap


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module with parameters, or the same module in many layers.

    Args:
        path: the module's full name; ``{}`` stands for the number of the layer.
        kind: ``linear`` (what ``all-linear`` means), ``head``, ``embedding``, ``norm`` or
            ``experts``, whose ``num_in`` and ``num_out`` are those of one expert.
        weights: parameters of one such module, biases included.
        num_biases: how many of them are its bias.
        numbers: the layers that have it; empty when there is one for the whole model.
        num_tied: parameters of one module that another part counts already.
        used_fraction: the share of its weights that one token is multiplied by.
    """

    path: str
    kind: str
    weights: int
    num_in: int = 0
    num_out: int = 0
    numbers: tuple[int, ...] = ()
    num_tied: int = 0
    num_biases: int = 0
    used_fraction: float = 1.0

    @property
    def count(self) -> int:
        """How often it occurs."""
        return len(self.numbers) if "{}" in self.path else 1

    @property
    def parameters(self) -> int:
        """Parameters of all occurrences that no other part holds."""
        return self.count * (self.weights - self.num_tied)

    @property
    def multiplied(self) -> float:
        """Weights that one token is multiplied by; none for embeddings and norms."""
        if self.kind == "experts":
            return self.used_fraction * self.count * self.weights
        return self.count * self.num_in * self.num_out if self.kind in ("linear", "head") else 0

    def names(self) -> Iterator[str]:
        """The full name of each occurrence."""
        if "{}" not in self.path:
            yield self.path
        for number in self.numbers:
            yield self.path.replace("{}", str(number))


def linear(path: str, num_in: int, num_out: int, *, has_bias: bool = False) -> Part:
    """A linear layer, y = W x + b.

    >>> linear("lm.fc", 4, 3, has_bias=True).parameters
    15
    """
    weights = num_in * num_out + num_out * has_bias
    return Part(
        path=path, kind="linear", weights=weights, num_in=num_in, num_out=num_out,
        num_biases=num_out * has_bias,
    )  # fmt: skip


def head(
    path: str, num_in: int, num_out: int, *, has_bias: bool = False, is_tied: bool = False
) -> Part:
    """An output head; a tied one takes its matrix from the embedding.

    >>> head("lm_head", 4, 10, is_tied=True).parameters, head("lm_head", 4, 10).parameters
    (0, 40)
    """
    return Part(
        path=path, kind="head", weights=num_in * num_out + num_out * has_bias, num_in=num_in,
        num_out=num_out, num_tied=num_in * num_out if is_tied else 0,
        num_biases=num_out * has_bias,
    )  # fmt: skip


def embedding(path: str, num_rows: int, width: int) -> Part:
    """A table of vectors."""
    return Part(
        path=path, kind="embedding", weights=num_rows * width, num_in=num_rows, num_out=width
    )


def norm(path: str, width: int, *, has_bias: bool = False) -> Part:
    """A norm's scale, with or without a shift; other single vectors too."""
    return Part(path=path, kind="norm", weights=width * (1 + has_bias), num_biases=width * has_bias)


def stacks_of(experts: Part) -> tuple[Part, ...]:
    """The two stacked parameters of E experts as LoRA adapts them: E matrices beside each other.

    >>> up, down = stacks_of(Part(path="m", kind="experts", weights=240, num_in=4, num_out=5))
    >>> up.path, up.num_in, up.num_out, down.num_in, down.num_out
    ('m.gate_up_proj', 16, 40, 20, 16)
    """
    h, w = experts.num_in, experts.num_out
    num = experts.weights // (3 * h * w) if h and w else 0
    sizes = {"gate_up_proj": (h, 2 * w), "down_proj": (w, h)} if num else {}
    return tuple(
        Part(
            path=f"{experts.path}.{name}", kind="stack", weights=num * num_in * num_out,
            num_in=num * num_in, num_out=num * num_out, numbers=experts.numbers,
        )
        for name, (num_in, num_out) in sizes.items()
    )  # fmt: skip


def in_layers(parts: Iterable[Part], numbers: Iterable[int]) -> list[Part]:
    """The parts of one layer, repeated in the layers of these numbers.

    >>> part, = in_layers([norm("h.{}.ln", 8)], range(3))
    >>> part.parameters, list(part.names())
    (24, ['h.0.ln', 'h.1.ln', 'h.2.ln'])
    """
    kept = tuple(numbers)
    return [_numbered(part, kept) for part in parts] if kept else []


def _numbered(part: Part, numbers: tuple[int, ...]) -> Part:
    return Part(**{**vars(part), "numbers": numbers})
