"""Whether a model's logits are exactly its head over its backbone, found out by measuring.

Scoring only supervised positions replaces ``model(ids)`` by two calls:

    h = backbone(ids),   logits = shape(head(h)),   shape(z) = c tanh(z / c) or z

That is right for most families and silently wrong for those that scale, bend or
transform in between (Cohere, Granite, RecurrentGemma, BERT's language heads ...).
A list of names would go stale with each release of transformers, so each model is
asked once: six tokens pass both ways, with the hidden state enlarged until the
logits reach +-100, where a scale or a bend cannot hide.  A model that fails is
scored through its own whole forward pass, which is slower and right.

The same question settles whether the model is causal: the last token is exchanged,
and no earlier logit may move.

Legend: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

PROBE_TOKENS = 6
LARGEST_LOGIT = 100.0  # above every soft cap in use (30 to 50)


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """What a probe found.

    Args:
        is_plain: logits are ``shape(head(backbone(ids)))``.
        is_causal: no logit depends on a later token.
    """

    is_plain: bool
    is_causal: bool


_FOUND: WeakKeyDictionary[nn.Module, HeadFacts] = WeakKeyDictionary()


def read_head_facts(model: nn.Module) -> HeadFacts:
    """What is known of a model's head; measured at the first call and remembered.

    Broken weights answer with NaN, from which nothing can be learned: the model is scored
    whole, so that the NaN reaches whoever checks the loss, and is asked again next time.

    Guarantees: no random number is drawn, no gradient or mode of a module changes.

    Cost: five forward passes over six tokens, once a model.
    """
    if model not in _FOUND:
        with torch.no_grad(), evaluation_mode(model):
            if not _is_finite(model):
                return HeadFacts(is_plain=False, is_causal=True)
            _FOUND[model] = HeadFacts(is_plain=_is_plain(model), is_causal=_is_causal(model))
    return _FOUND[model]


def head_of(model: nn.Module) -> Any:
    """The module that turns hidden states into logits, or None."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def backbone_of(model: nn.Module) -> nn.Module:
    """The model without its output head; the model itself when there is no such part."""
    return getattr(model, getattr(model, "base_model_prefix", "") or "", model)


def soft_cap_of(model: nn.Module) -> float | None:
    """Gemma 2's c of the final logits, z -> c tanh(z / c), or None."""
    return getattr(model.config, "final_logit_softcapping", None)


def count_ids(model: nn.Module) -> int:
    """Rows of the embedding."""
    table = model.get_input_embeddings()
    found = getattr(table, "num_embeddings", None)  # what is held in 16 bits is not widened for it
    return table.weight.shape[0] if found is None else found


def bend(logits: Tensor, soft_cap: float | None) -> Tensor:
    """The soft cap of logits; without one they pass."""
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def _is_finite(model: nn.Module) -> bool:
    """Whether the probe's logits are numbers at all."""
    return bool(torch.isfinite(model(input_ids=_probe_ids(model), use_cache=False)[0]).all())


def _is_plain(model: nn.Module) -> bool:
    """Both ways on six tokens, with an enlarged hidden state."""
    head, backbone = head_of(model), backbone_of(model)
    if head is None or backbone is model:
        return False
    ids_BT = _probe_ids(model)
    try:
        hidden_BTD = backbone(input_ids=ids_BT, use_cache=False)[0]
        factor = LARGEST_LOGIT / max(float(head(hidden_BTD).abs().max()), 1e-6)
        expected_BTV = bend(head(hidden_BTD * factor).float(), soft_cap_of(model))
        handle = backbone.register_forward_hook(_enlarge_by(factor))
        try:
            found_BTV = model(input_ids=ids_BT, use_cache=False)[0].float()
        finally:
            handle.remove()
    except (TypeError, ValueError, AttributeError):
        return False
    is_alike = found_BTV.shape == expected_BTV.shape
    return is_alike and _is_near(found_BTV, expected_BTV, 1e-3 * _coarseness(hidden_BTD))


def _is_causal(model: nn.Module) -> bool:
    """Whether another last token leaves all earlier logits alone."""
    ids_BT = _probe_ids(model)
    other_BT = ids_BT.clone()
    other_BT[:, -1] = 0
    first_BTV = model(input_ids=ids_BT, use_cache=False)[0][:, :-1]
    second_BTV = model(input_ids=other_BT, use_cache=False)[0][:, :-1]
    return _is_near(first_BTV, second_BTV, 1e-5 * _coarseness(first_BTV))


def _probe_ids(model: nn.Module) -> Tensor:
    """Ids from the upper half of the vocabulary, where padding and specials are rare."""
    num_ids = count_ids(model)
    device = next(model.parameters()).device
    return (torch.arange(PROBE_TOKENS, device=device) * 7 % (num_ids // 2) + num_ids // 2)[None]


def _is_near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Finite, and equal within a share of the largest logit."""
    scale = float(expected.abs().max()) * tolerance
    return bool(torch.isfinite(found).all()) and float((found - expected).abs().max()) <= scale


def _coarseness(values: Tensor) -> float:
    """How much more coarsely 16-bit numbers round, with room below a visible scale."""
    return 1.0 if values.dtype == torch.float32 else 30.0


def _enlarge_by(factor: float) -> Any:
    """A forward hook that multiplies the hidden state of a backbone's output."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * factor, *output[1:])
        output[next(iter(output))] = output[0] * factor
        return output

    return hook


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
