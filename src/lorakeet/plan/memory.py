"""Memory of training, one formula a part, as the process or the card's allocator counts it.

With N parameters in the matrices that ``quantization`` chooses, M in all others, P trained,
w bytes a weight (4 on a CPU and for full, else 2 on a GPU):

    weights       full, lora: w (N + M)     lora-8bit: N + w M     qlora: 0.516 N + w M
                                            lora on a CPU, from a checkpoint in 16 bits: 2 N + w M,
                                            with the embedding and the head counted in N
                                            in fewer than w bytes also w times the largest of them,
                                            the scratch that one at a time is expanded into;
                                            from 16 bits at least what loading needs, less what
                                            comes afterwards: the ends in both forms, and for
                                            DoRA the wide model and its mapped file
    adapter       4 P                       A, B and saved modules in float32; nothing for full
    gradients     4 P                       (w P for full)
    optimizer     8 P                       AdamW's two moments in float32; 2.03 P in 8 bits;
                                            8 P more for AdaLoRA's scores; paged moments are in
                                            main memory, and one piece of them on a GPU
    copies        4 P                       the best weights (w P for full); and the state that
                  + 4 P + optimizer         a checkpoint writes while the next steps are made
                                            (on a GPU both are in main memory)
    activations   see below
    process       what is there before a model: Python, torch, transformers; on a CPU also the
                  compiler of the kernels for few bits; measured

0.516 bytes is NF4 with double quantisation; ``plan.few_bits`` counts it for other settings.

Activations of T tokens in a micro-batch, with hidden width D, feed-forward width F and Q = the
width of all query heads; what a layer keeps a token for its backward pass is:

    4 D     the residual stream twice (the two norms keep it) and the two norms' answers; 2 D
            where LoRA on a CPU reads RMS norms, whose answers it makes again
    2 Q     the queries, and attention's answer;  2 K  keys and values, K wide;  Q and K
            once more where norms of their own stand before them
    3 F     a gated feed-forward part: gate, up and their product; 2 F without a gate, and
            for LoRA, which makes the product again
    r       of each adapted module, z = x A^T; AdaLoRA keeps it twice, and DoRA keeps two
            arrays of each module's output width besides

``plan.experts`` tells what a mixture of experts keeps in the place of the third line.  All are
counted as autograd saves them, to the number.  With gradient checkpointing this is one layer's,
and D of each layer besides, which offload holds in main memory.  Besides there is, at one time,
either the layer at work (4 F + 2 D a token) or the output head: 4 C bytes each for a chunk of C
logits, its exponentials and the chunk before (on a GPU w C, twice), 3 D a token for the states
and their gradients, and, where it is trained, two arrays of its size.

On a CPU the C library's heap has holes beside what is kept: an eighth of it, as the weights lie
apart (``models.heap``), gradients have places of their own, and answers that are let go leave
holes that what is kept fits into.  Full training and mixtures of experts, which plain autograd
computes, leave 0.6 of it.  DoRA and AdaLoRA, which are computed step by step, leave two and one
more of each module's output width.  These shares are measured (``benchmarks.plan_accuracy``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.recipe import Recipe
from lorakeet.base.units import MIB
from lorakeet.plan.experts import count_dense_width, count_routed, count_stacks
from lorakeet.plan.few_bits import count_quantized
from lorakeet.plan.model_facts import ModelFacts
from lorakeet.plan.trained import TrainedCount

KINDS = ("full", "lora", "lora-8bit", "qlora")
IN_FEW_BITS = ("lora-8bit", "qlora")
CHUNK_LOGITS, GPU_CHUNK_LOGITS = 4_000_000, 2**26
AUTO_MICRO_BATCH_TOKENS = 1024  # as fast as 2048, measured, in half of the memory
MOMENT_BYTES = {"adamw": 8.0, "adamw-8bit": 2.03, "adamw-paged": 8.0, "adamw-8bit-paged": 2.03}
PAGE_BYTES = 32 * MIB  # a piece of m, v, g and w in float32, and what their update makes of them
ADALORA_SCORE_BYTES = 8
PROCESS_BYTES = {False: 400 * MIB, True: 600 * MIB}  # on a CPU; a CUDA context on a GPU
COMPILER_BYTES = 70 * MIB  # LLVM and the kernels that it has made for layers in few bits
HOLE_ARRAYS = {"lora": 0, "dora": 2, "adalora": 1}  # measured: what steps of W0 x + ... leave
RANK_ARRAYS = {"lora": 1, "dora": 1, "adalora": 2}
AT_WORK_F = 4  # arrays of T x F that the layer at work holds besides what is kept
ALLOCATOR_FRACTION = {False: 0.12, True: 0.05}  # of what is kept: holes that stay empty
PLAIN_FRACTION = 0.6  # the same where layers are plain autograd's: full training, experts


@dataclass(frozen=True, kw_only=True)
class MemoryParts:
    """Predicted bytes by part."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Parts and total as plain JSON."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """What the memory of one method depends on besides the model.

    Args:
        counted: what an adapter trains.
        micro_batch_tokens: T, tokens that pass the model at once, padding included.
        form: ``lora``, ``dora`` or ``adalora``, what the adapter computes.
        optimizer: a key of ``MOMENT_BYTES``.
        quantization: which layers a base in few bits holds so, and in which blocks.
        recompute: ``train.gradient_checkpointing``; ``auto`` counts as off, where it begins.
        keeps_best: whether a validation chooses weights that are kept beside the last ones.
    """

    counted: TrainedCount
    micro_batch_tokens: int
    is_gpu: bool
    form: str = "lora"
    optimizer: str = "adamw"
    quantization: QuantizationSettings = QuantizationSettings()
    keeps_best: bool = True
    recompute: str = "off"

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed again from the first step on."""
        return self.recompute in ("on", "offload")


def to_memory_case(
    recipe: Recipe, counted: TrainedCount, *, micro_batch_tokens: int, is_gpu: bool
) -> MemoryCase:
    """What a recipe says of its memory."""
    method = recipe.method
    return MemoryCase(
        counted=counted, micro_batch_tokens=micro_batch_tokens, is_gpu=is_gpu,
        form="adalora" if method.adalora else "dora" if method.dora else "lora",
        quantization=recipe.quantization, optimizer=recipe.train.optimizer,
        keeps_best=recipe.data.validation != 0, recompute=recipe.train.gradient_checkpointing,
    )  # fmt: skip


def kind_of(recipe: Recipe) -> str:
    """The one of ``KINDS`` that a recipe asks for."""
    if not recipe.quantization.is_on:
        return recipe.method.kind
    return "lora-8bit" if recipe.quantization.kind == "int8" else "qlora"


def count_micro_batch_tokens(recipe: Recipe, longest: int | None = None) -> int:
    """The largest micro-batch: the limit, or one sample that is longer, as none is split.

    Args:
        longest: tokens of the longest sample; the recipe's window when it is not known.
    """
    asked = recipe.train.micro_batch_tokens
    longest = recipe.data.max_tokens if longest is None else longest
    return max(AUTO_MICRO_BATCH_TOKENS if asked == "auto" else asked, longest)


def estimate_memory(facts: ModelFacts, kind: str, case: MemoryCase) -> MemoryParts:
    """Predicted bytes of a method.

    Args:
        kind: one of ``KINDS``.
    """
    w = 2 if case.is_gpu and kind != "full" else 4
    trained = facts.parameters if kind == "full" else case.counted.total
    moments = MOMENT_BYTES[case.optimizer]
    if kind != "full" and case.form == "adalora":
        moments += ADALORA_SCORE_BYTES
    own = w if kind == "full" else 4
    optimizer, activations = int(moments * trained), _count_activations(facts, kind, case, w)
    if case.is_gpu and case.optimizer.endswith("paged"):
        optimizer = min(optimizer, PAGE_BYTES)
    state = own * trained + optimizer
    copies = 0 if case.is_gpu else own * trained * case.keeps_best + state
    later = own * trained + optimizer + copies + activations
    return MemoryParts(
        weights=_count_weights(facts, kind, case, w, later),
        adapter=0 if kind == "full" else 4 * trained,
        gradients=own * trained,
        optimizer=optimizer,
        copies=copies,
        activations=activations,
        process=PROCESS_BYTES[case.is_gpu]
        + (kind in IN_FEW_BITS and not case.is_gpu) * COMPILER_BYTES,
    )


def _count_weights(facts: ModelFacts, kind: str, case: MemoryCase, w: int, later: int) -> int:
    """The base as it is held: what is in fewer bytes with one expanded layer, and the rest.

    Args:
        later: bytes that come when the base is loaded; a base that is held in fewer bytes than
            it is loaded in counts at least what they leave of its wide form.
    """
    if kind in IN_FEW_BITS:
        held = count_quantized(facts, case.quantization, kind)
        return held.num_bytes + w * (facts.parameters - held.parameters + held.largest)
    stored = facts.stored_bytes
    if kind != "lora" or case.is_gpu or stored >= w:
        return w * facts.parameters
    ends = _count_ends(facts)
    narrow = facts.linear_parameters + ends
    largest = max((p.weights for p in facts.parts if p.kind == "linear"), default=0)
    held = stored * narrow + w * (facts.parameters - narrow + largest)
    wide = facts.parameters - (0 if case.form == "dora" else facts.linear_parameters)
    double = facts.parameters if case.form == "dora" else narrow
    return max(held, w * wide + stored * double - later)


def count_kept(facts: ModelFacts, kind: str, case: MemoryCase) -> int:
    """Numbers that all layers keep a token for the backward pass."""
    heads = (2 + facts.has_head_norms) * (facts.query_width + facts.key_width)
    keeps_product = kind == "full" or case.form != "lora"
    inner = 3 if facts.is_gated and keeps_product else 2
    stream = (2 + _count_norm_answers(facts, kind, case)) * facts.hidden
    kept = (stream + heads) * facts.layers + inner * count_dense_width(facts)
    kept += count_routed(facts, is_adapter=kind != "full", counted=case.counted)
    if kind == "full":
        return kept
    kept += RANK_ARRAYS[case.form] * case.counted.rank_sum
    return kept + (2 * case.counted.output_sum if case.form == "dora" else 0)


def _count_norm_answers(facts: ModelFacts, kind: str, case: MemoryCase) -> int:
    """How many of a layer's two norms have their answers kept; routed experts keep theirs."""
    makes_again = kind != "full" and case.form == "lora" and not case.is_gpu and facts.is_gated
    return int(any(part.kind == "experts" for part in facts.parts)) if makes_again else 2


def _count_kept_at_once(facts: ModelFacts, kind: str, case: MemoryCase) -> float:
    """Of ``count_kept``, what is there at one time: recomputed, one layer and all inputs."""
    kept = count_kept(facts, kind, case)
    if not case.recomputes:
        return kept
    is_away = case.is_gpu and case.recompute == "offload"
    return kept / facts.layers + (0 if is_away else facts.hidden * facts.layers)


def _count_activations(facts: ModelFacts, kind: str, case: MemoryCase, w: int) -> int:
    """What a micro-batch keeps for its backward pass, the layer at work, and the head."""
    tokens, hidden, ffn = case.micro_batch_tokens, facts.hidden, facts.ffn
    kept = _count_kept_at_once(facts, kind, case)
    layer = tokens * (AT_WORK_F * ffn + 2 * hidden) * w
    logits = tokens * facts.vocabulary
    head = _count_chunks(logits, w if case.is_gpu else 0) + tokens * 3 * hidden * 4
    tables = 2 * w * facts.vocabulary * hidden if kind == "full" else 0
    stacks = count_stacks(case.counted, facts.layers if case.recomputes else 1)
    return (
        int(tokens * kept * w) + _count_holes(facts, kind, case) + max(layer, head)
        + tables + w * stacks * (kind != "full")
    )  # fmt: skip


def _count_holes(facts: ModelFacts, kind: str, case: MemoryCase) -> int:
    """Bytes that the allocator holds beside what is kept, and cannot use for the same again."""
    w = 2 if case.is_gpu and kind != "full" else 4
    is_plain = kind == "full" or any(part.kind == "experts" for part in facts.parts)
    fraction = PLAIN_FRACTION if is_plain and not case.is_gpu else ALLOCATOR_FRACTION[case.is_gpu]
    holes = fraction * _count_kept_at_once(facts, kind, case)
    if kind != "full" and not case.is_gpu:
        at_once = 1 if not case.recomputes else 1 / facts.layers
        holes += HOLE_ARRAYS[case.form] * case.counted.output_sum * at_once
    return int(case.micro_batch_tokens * holes * w)


def _count_ends(facts: ModelFacts) -> int:
    """Parameters of the embedding and the head where both are held as the checkpoint holds them.

    Gemma scales the rows of its table and bends its logits, so it has them in float32.
    """
    if facts.model_type.startswith("gemma"):
        return 0
    tables = [part.parameters for part in facts.parts if part.kind == "embedding"]
    heads = [part.parameters for part in facts.parts if part.kind == "head"]
    return max(tables, default=0) + sum(heads)


def _count_chunks(logits: int, gpu_w: int) -> int:
    """Bytes of the output head's chunks; the one before is let go when the next is there.

    Args:
        gpu_w: bytes of a logit on a GPU, where its gradient is written over it; 0 on a CPU.
    """
    if gpu_w:
        return (1 + (logits > GPU_CHUNK_LOGITS)) * gpu_w * min(GPU_CHUNK_LOGITS, logits)
    return (2 + (logits > CHUNK_LOGITS)) * 4 * min(CHUNK_LOGITS, logits)
