"""What code can serve a GPU here, found by name, without torch and without importing it.

Triton compiles our own kernels; it comes with torch's CUDA builds for Linux.  flash_attn and
torch's FlexAttention attend documents that lie end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

FLASH, FLEX, APART = "flash-varlen", "flex", "sdpa-per-document"
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """How packed documents are attended.

    Args:
        way: ``FLASH``, ``FLEX`` or ``APART``.
        why: a finished sentence.
    """

    way: str
    why: str


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def has_flash_attention() -> bool:
    """Whether the package flash_attn is installed."""
    return find_spec("flash_attn") is not None


def choose_packed_attention(device: str, dtype: str) -> AttentionChoice:
    """How packed documents are attended on a device, at the dtype of the model.

    Args:
        device: torch's word for its kind, such as ``cpu`` or ``cuda``.
        dtype: such as ``bfloat16``.

    >>> choose_packed_attention("cpu", "float32").way
    'sdpa-per-document'
    """
    if device != "cuda":
        return AttentionChoice(way=APART, why="each document has its own call on a CPU.")
    if has_flash_attention() and dtype in HALVES:
        return AttentionChoice(way=FLASH, why="flash_attn is installed; all documents in one call.")
    missing = (
        "flash_attn is not installed"
        if dtype in HALVES
        else f"flash_attn takes 16-bit numbers and these are {dtype}"
    )
    if has_triton():
        return AttentionChoice(way=FLEX, why=f"{missing}; FlexAttention compiles a mask instead.")
    return AttentionChoice(
        way=APART, why=f"{missing} and Triton is absent, so each document has its own call."
    )
