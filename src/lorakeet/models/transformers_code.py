"""The parts of transformers that a packed model needs, imported without what none of them calls.

transformers' model code brings in scipy's optimisers (for the loss of object detectors) and,
through torch's compiler, Triton, though nothing is compiled without a GPU: 110 MB of a process.
While it is imported, Triton counts as not installed where there is no GPU, and the one function
of scipy imports scipy when it is called.  Afterwards both can be imported as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

_TRITON, _OPTIMIZERS = "triton", "scipy.optimize"


@contextmanager
def _without_unused() -> Iterator[None]:
    """Inside, what a CPU never calls is not imported; what is there already stays."""
    stand_ins = {_OPTIMIZERS: _build_optimizers()}
    if not torch.cuda.is_available():
        stand_ins[_TRITON] = None
    put = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(put)
    try:
        yield
    finally:
        for name, module in put.items():
            if sys.modules.get(name, put) is module:
                del sys.modules[name]


def _build_optimizers() -> Any:
    """A module whose only function is scipy's, imported at its first call."""
    module: Any = ModuleType(_OPTIMIZERS)

    def linear_sum_assignment(*args: Any, **kwargs: Any) -> Any:
        """scipy's own."""
        from scipy.optimize import linear_sum_assignment as real

        return real(*args, **kwargs)

    module.linear_sum_assignment = linear_sum_assignment
    return module


with _without_unused():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "sdpa_attention_forward",
    "sdpa_mask",
]
