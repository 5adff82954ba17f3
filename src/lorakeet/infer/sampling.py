"""How the next token is chosen, and when an answer ends.

This file needs no torch, so that a scheduler can sort requests by their
settings.  ``infer.draw`` does the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakeet.base.errors import RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """The rules of one answer.

    Args:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_p: only the smallest set of tokens with at least this probability; 0 < top_p <= 1.
        top_k: only this many likeliest tokens; 0 means all.
        max_new_tokens: the longest answer, in tokens; the model's window may end it earlier.
        stop: the answer ends before the first of these strings.
        seed: all randomness of the answer follows from it.

    Raises:
        RequestError: a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        object.__setattr__(self, "stop", tuple(self.stop))
        limits = (
            (self.temperature >= 0, f"temperature is {self.temperature}; give 0 or more"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}; give more than 0 and at most 1"),
            (self.top_k >= 0, f"top_k is {self.top_k}; give 0 for all tokens, or a number of them"),
            (self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}; give at least 1"),
            (all(self.stop), "a stop string is empty, so no text could come before it; remove it"),
        )
        problems = [problem for is_right, problem in limits if not is_right]
        if problems:
            raise RequestError("; ".join(problems) + ".")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1
