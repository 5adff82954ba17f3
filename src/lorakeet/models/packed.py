"""Documents of one row that do not see each other: attention, positions, and a proof.

transformers calls attention through a table of functions, so one function serves
every family that uses the table: it attends document by document with the
fastest kernel that torch has, without ever building a T x T mask.

    out[:, a:b] = attention(q[:, a:b], k[:, a:b], v[:, a:b])    for documents a:b

Whether a family really goes through the table, and where its positions begin (RoBERTa
counts from padding_idx + 1), is not guessed from names: each model is asked once to
answer two short documents packed and apart.  A model whose answers differ is batched
with padding instead, which is slower and right.

Legend: T tokens of the row, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorakeet.models.attention import How, Layout, attend_first, attend_segments
from lorakeet.models.attention_gpu import find_attention
from lorakeet.models.head import backbone_of, count_ids, evaluation_mode
from lorakeet.models.transformers_code import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    sdpa_attention_forward,
    sdpa_mask,
)

NAME = "lorakeet_packed"
PROBE_LENGTHS = (5, 3)
_JOINS = ("attention.output", "sa_layer_norm")  # BERT's kin, DistilBERT
_FAILURES = (TypeError, ValueError, AttributeError, IndexError, RuntimeError, StopIteration)


@dataclass(frozen=True, kw_only=True)
class _Pack:
    """What holds while a pack passes the model: its layout, and the model's configurations.

    Args:
        first_queries: ids of modules whose attention is read at first tokens only.
    """

    layout: Layout
    configs: tuple[Any, ...]
    first_queries: frozenset[int] = frozenset()


_PACK: ContextVar[_Pack | None] = ContextVar("lorakeet_pack", default=None)


@dataclass(frozen=True, kw_only=True)
class PackFacts:
    """What a probe found.

    Args:
        is_packable: packed documents answer as they do alone.
        is_row_packable: a classifier's logits too.
        is_shareable: documents answer as they do alone when their common opening stands once.
        first_position: the position of a document's first token.
    """

    is_packable: bool
    is_row_packable: bool
    is_shareable: bool
    first_position: int


_FOUND: WeakKeyDictionary[nn.Module, PackFacts] = WeakKeyDictionary()


def read_pack_facts(model: nn.Module) -> PackFacts:
    """Whether a model's documents can be packed; measured at the first call and remembered.

    Cost: at most eight forward passes over eight tokens, once a model.
    """
    if model not in _FOUND:
        padding_idx = getattr(model.config, "pad_token_id", None) or 0
        with torch.no_grad(), evaluation_mode(model):
            firsts = [first for first in (0, padding_idx + 1) if _answers_alike(model, first)]
            first = firsts[0] if firsts else 0
            _FOUND[model] = PackFacts(
                is_packable=bool(firsts), first_position=first,
                is_row_packable=bool(firsts) and _classifies_alike(model, first),
                is_shareable=bool(firsts) and _shares_alike(model, first),
            )  # fmt: skip
    return _FOUND[model]


@contextmanager
def first_tokens_only(model: nn.Module, bounds: tuple[int, ...]) -> Iterator[None]:
    """Inside, the layers hand on the first token of each document, [N, 1, D] for [1, T, D].

    A classifier's pooler and head read a row's first token; so each document is a row to
    them.  After the last attention tokens no longer see each other: where a layer's form is
    known (``_JOINS``), the others are left out from there on, which is exact.  A model without
    one stack of layers under its backbone fails the probe.

    Cost: less; in a stack of 12 about 6 % of the work.
    """
    layers = next(
        part
        for name in ("encoder", "transformer")
        if (part := getattr(backbone_of(model), name, None))
    )
    starts = torch.tensor(bounds[:-1])

    def choose(x: Tensor) -> Tensor:
        is_chosen = x.shape[:2] == (len(starts), 1)
        return x if is_chosen else x[0].index_select(0, starts.to(x.device))[:, None]

    def choose_answer(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (choose(output[0]), *output[1:])
        output[next(iter(output))] = choose(output[0])
        return output

    handles = [layers.register_forward_hook(choose_answer)]
    last, pack = getattr(layers, "layer", [None])[-1], _PACK.get()
    join = _find_join(last)
    if join is not None and pack is not None:
        handles.append(
            join.register_forward_pre_hook(lambda module, inputs: tuple(map(choose, inputs)))
        )
        pack = replace(pack, first_queries=frozenset(map(id, last.modules())))
    token = _PACK.set(pack)
    try:
        yield
    finally:
        _PACK.reset(token)
        for handle in handles:
            handle.remove()


def _find_join(layer: nn.Module | None) -> nn.Module | None:
    """What an encoder's layer calls with the answer of its attention; from there tokens are apart.

    None too where the layer is computed again in the backward pass, without these hooks.
    """
    if layer is None or "forward" in vars(layer):
        return None
    held = dict(layer.named_modules())
    return next((held[path] for path in _JOINS if path in held), None)


@contextmanager
def packed(
    model: nn.Module, bounds: tuple[int, ...], parents: tuple[int, ...] = ()
) -> Iterator[None]:
    """Inside, the model's attention keeps the documents of a row apart.

    Args:
        parents: of each segment the one that it goes on from; see ``base.records.Pack``.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    pack = _Pack(layout=Layout.build(bounds, parents), configs=tuple(configs.values()))
    with _attending(pack):
        yield


def same_pack() -> AbstractContextManager[None]:
    """Where layers are computed again, later and in any thread: the pack of this moment."""
    pack = _PACK.get()
    return _attending(pack) if pack is not None else nullcontext()


@contextmanager
def _attending(pack: _Pack) -> Iterator[None]:
    """Inside, attention goes through ``attend`` and knows the pack."""
    former = [config._attn_implementation for config in pack.configs]
    token = _PACK.set(pack)
    try:
        for config in pack.configs:
            config._attn_implementation = NAME
        yield
    finally:
        _PACK.reset(token)
        for config, name in zip(pack.configs, former, strict=True):
            config._attn_implementation = name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call, document by document.

    Args:
        query: [1, H, T, D]; key and value may have fewer heads.
        options: transformers' dropout, scaling, is_causal, sliding_window and softcap.

    Returns:
        ([1, T, H, D], None).
    """
    pack = _PACK.get()
    if pack is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = options.get("is_causal")
    how = How(
        is_causal=getattr(module, "is_causal", True) if causal is None else causal,
        dropout=options.get("dropout", 0.0), scaling=options.get("scaling"),
        window=options.get("sliding_window"), soft_cap=options.get("softcap"),
    )  # fmt: skip
    is_first_only = id(module) in pack.first_queries and query.device.type == "cpu"
    if is_first_only and not how.is_causal and how.window is None:
        return attend_first(query, key, value, pack.layout, how).transpose(1, 2), None
    call = find_attention(query, value, how) or attend_segments
    return call(query, key, value, pack.layout, how).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask builder: none for a pack, its own otherwise."""
    return None if _PACK.get() is not None else sdpa_mask(*args, **kwargs)


def _answers_alike(model: nn.Module, first: int) -> bool:
    """Whether two documents answer alike packed and apart, positions beginning at ``first``."""
    ids, positions, bounds = _probe(model, first)
    backbone = backbone_of(model)
    try:
        apart = [backbone(input_ids=part)[0] for part in ids.split(PROBE_LENGTHS, dim=1)]
        with packed(model, bounds):
            together = backbone(input_ids=ids, position_ids=positions)[0]
    except _FAILURES:
        return False
    return _is_near(together, torch.cat(apart, dim=1))


def _shares_alike(model: nn.Module, first: int) -> bool:
    """Whether two documents answer alike apart and with their first tokens standing once."""
    ids, _, bounds = _probe(model, first)
    opening, end = bounds[1] // 2, bounds[2]
    layout = (0, opening, *bounds[1:])
    positions = torch.arange(end, device=ids.device)[None] + first
    positions[:, bounds[1] :] -= bounds[1] - opening
    other = torch.cat([ids[:, :opening], ids[:, bounds[1] :]], dim=1)
    backbone = backbone_of(model)
    try:
        one, two = backbone(input_ids=ids[:, : bounds[1]])[0], backbone(input_ids=other)[0]
        with packed(model, layout, (-1, 0, 0)):
            together = backbone(input_ids=ids, position_ids=positions)[0]
    except _FAILURES:
        return False
    return _is_near(together, torch.cat([one, two[:, opening:]], dim=1))


def _classifies_alike(model: nn.Module, first: int) -> bool:
    """Whether the logits of two documents are alike packed and apart."""
    if not hasattr(model, "num_labels") or backbone_of(model) is model:
        return False
    ids, positions, bounds = _probe(model, first)
    try:
        apart = [model(input_ids=part)[0] for part in ids.split(PROBE_LENGTHS, dim=1)]
        with packed(model, bounds), first_tokens_only(model, bounds):
            together = model(input_ids=ids, position_ids=positions)[0]
    except _FAILURES:
        return False
    return _is_near(together, torch.cat(apart, dim=0))


def _probe(model: nn.Module, first: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Ids and positions of two short documents in one row, and their bounds."""
    num_ids = count_ids(model)
    device = next(model.parameters()).device
    ids_T = torch.arange(sum(PROBE_LENGTHS), device=device) * 11 % (num_ids // 2) + num_ids // 2
    positions_T = torch.cat([torch.arange(length) + first for length in PROBE_LENGTHS]).to(device)
    return ids_T[None], positions_T[None], (0, PROBE_LENGTHS[0], sum(PROBE_LENGTHS))


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """Of one shape, finite, and equal up to rounding."""
    if found.shape != expected.shape or not torch.isfinite(expected).all():
        return False
    near = 1e-4 if expected.dtype == torch.float32 else 3e-2
    return float((found - expected).abs().max()) <= near * float(expected.abs().max())


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)
