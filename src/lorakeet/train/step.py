"""One optimiser step: many micro-batches, one token count, one division.

    g = (1 / n) sum over micro-batches of d loss_sum / d theta,   n = targets of the step

The count n is taken over the whole step before the first micro-batch runs, so how
the step is cut into micro-batches changes memory and nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorakeet.adapters.adalora import RankAllocator
from lorakeet.base.errors import MachineError
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import Batch, EncodedSample, Pack
from lorakeet.data.collate import collate
from lorakeet.data.order import split_micro_batches
from lorakeet.data.packing import build_pack, pack_evenly
from lorakeet.data.prefixes import Prefixes, choose_prefixes
from lorakeet.models.out_of_memory import is_out_of_memory
from lorakeet.models.packed import read_pack_facts
from lorakeet.models.recompute import OFF, list_modes, recompute_layers
from lorakeet.models.score import score_labels, score_pack, score_pack_labels, score_targets
from lorakeet.models.shared import score_shared_pack
from lorakeet.plan.memory import AUTO_MICRO_BATCH_TOKENS
from lorakeet.train.frozen_states import FrozenStates
from lorakeet.train.gradients import build_places, move_gradients
from lorakeet.train.not_finite import name_not_finite, to_not_finite_error
from lorakeet.train.optimizer import build_optimizer
from lorakeet.train.randomness import hash_seed, own_randomness


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step measured.

    Args:
        loss: mean over targets, nats.
        gradient_norm: before clipping.
    """

    loss: float
    gradient_norm: float
    num_targets: int
    num_tokens: int
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class StepRunner:
    """A model with its optimiser and the limits of a step.

    Args:
        parameters: every trained parameter.
        micro_batch_tokens: tokens that pass the model at once, padding included.
        packs: rows lie end to end instead of padded; the model must be packable.
        shares: what the samples of a pack open with stands once; the model must be shareable.
        frozen: the kept answers of the frozen layers; rows are packed and nothing is shared.
        recompute: ``off``, ``on`` or ``offload``; see ``models.recompute``.
        recompute_next: what may follow, in this order, when one sample does not fit.
        places: of the gradients; see ``train.gradients``.
        penalty: added to the loss once a step; it is in the gradient, not in the report.
        after_step: called with the step's number between the optimiser's step and the
            clearing of the gradients.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: tuple[nn.Parameter, ...]
    pad_id: int
    micro_batch_tokens: int
    max_gradient_norm: float
    packs: bool = False
    shares: bool = False
    frozen: FrozenStates | None = None
    recompute: str = OFF
    recompute_next: tuple[str, ...] = ()
    places: tuple[Tensor, ...] = ()
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], None] | None = None

    def run(
        self,
        samples: Sequence[EncodedSample],
        seed: tuple[int, int],
        groups: Sequence[Sequence[int]] | None = None,
    ) -> StepResult:
        """Accumulates, checks, clips and steps.

        Args:
            seed: (run seed, step); dropout depends on nothing else, so a resumed run
                draws the same masks.
            groups: positions in ``samples`` that pass the model together; None cuts by
                ``micro_batch_tokens``.

        Raises:
            BadBatchError: loss, gradient or a weight is not finite, or no token of the step is
                trained; the optimiser has not stepped.
            MachineError: memory ran out in the optimiser's own step.
        """
        started_s = time.perf_counter()
        lengths = [len(sample.ids) for sample in samples]
        prefixes = self._choose_prefixes(samples)
        groups = groups or self._cut(lengths, prefixes)
        batches = [self._build(samples, group, prefixes) for group in groups]
        num_targets = sum(batch.num_targets for batch in batches)
        randomness = own_randomness(self.parameters[0].device, hash_seed(*seed))
        with randomness, recompute_layers(self.model, self.recompute):
            rows = [[samples[i] for i in group] for group in groups]
            losses = self._accumulate(batches, rows, num_targets)
        if self.penalty is not None:
            self.penalty().backward()
        loss = sum(losses) / num_targets
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_gradient_norm))
        weights = _norm_of(self.parameters)
        if not (math.isfinite(loss) and math.isfinite(norm) and math.isfinite(weights)):
            culprits = name_not_finite(self.model)
            self.optimizer.zero_grad(set_to_none=True)
            bad = [i for group, part in zip(groups, losses, strict=True)
                   if not math.isfinite(part) for i in group]  # fmt: skip
            found = f"the loss is {loss:.4g} and the gradient norm {norm:.4g}{culprits}"
            raise to_not_finite_error(found, [samples[i] for i in bad] or samples, seed[1],
                              is_in_weights=not math.isfinite(weights))  # fmt: skip
        self._move(seed[1])
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss, gradient_norm=norm, num_targets=num_targets, num_tokens=sum(lengths),
            duration_s=time.perf_counter() - started_s,
        )  # fmt: skip

    def cut(self, samples: Sequence[EncodedSample]) -> list[list[int]]:
        """The micro-batches that a step of these samples has, as positions within it."""
        return self._cut([len(s.ids) for s in samples], self._choose_prefixes(samples))

    def recomputing(self, mode: str) -> StepRunner:
        """The runner in a mode of ``recompute``; only what saves more may follow."""
        later = self.recompute_next
        later = later[later.index(mode) + 1 :] if mode in later else later
        return replace(self, recompute=mode, recompute_next=later)

    def _move(self, step: int) -> None:
        """The optimiser's step; from here on a step cannot be made again."""
        try:
            self.optimizer.step()
            if self.after_step is not None:
                self.after_step(step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MachineError(
                f"step {step}: memory ran out while the optimiser moved the weights, so some may "
                "have moved and some not; nothing of it is kept. Set train.optimizer: adamw-8bit "
                "or a lower method.rank, free memory, and resume from the newest checkpoint."
            ) from error

    def _choose_prefixes(self, samples: Sequence[EncodedSample]) -> Prefixes | None:
        """What the samples of a step share, where sharing is possible and pays."""
        return choose_prefixes(samples) if self.shares else None

    def _cut(self, lengths: Sequence[int], prefixes: Prefixes | None) -> list[list[int]]:
        """The rows of a step in micro-batches, as positions within the step."""
        if self.packs:
            return pack_evenly(lengths, prefixes, self.micro_batch_tokens)
        return split_micro_batches(lengths, self.micro_batch_tokens)

    def _build(
        self, samples: Sequence[EncodedSample], group: Sequence[int], prefixes: Prefixes | None
    ) -> Batch | Pack:
        chosen = [samples[i] for i in group]
        if not self.packs:
            return collate(chosen, self.pad_id)
        return build_pack(chosen, prefixes.among(group) if prefixes else None)

    def _accumulate(
        self,
        batches: Sequence[Batch | Pack],
        rows: Sequence[Sequence[EncodedSample]],
        num_targets: int,
    ) -> list[float]:
        """Adds up the gradients of all micro-batches; returns the summed loss of each."""
        device = self.parameters[0].device
        losses = []
        for batch, own in zip(batches, rows, strict=True):
            score = score_packed if isinstance(batch, Pack) else score_batch
            with self.frozen.passing(own, device) if self.frozen else nullcontext():
                loss_sum = score(self.model, batch, device)
            (loss_sum / num_targets).backward()
            if not losses:
                move_gradients(self.parameters, self.places)
            losses.append(loss_sum.detach())
            del loss_sum  # its graph, empty by now, would lie between the next one's arrays
        return torch.stack(losses).tolist()  # one wait for the device a step


def build_runner(
    model: nn.Module, recipe: Recipe, *, pad_id: int, allocator: RankAllocator | None = None
) -> StepRunner:
    """The optimiser and the limits of a step, as a recipe asks for them.

    Args:
        allocator: AdaLoRA's, which adds to the loss and acts after each step.

    Raises:
        RequestError: nothing in the model is trained.
    """
    settings = recipe.train
    named = list(model.named_parameters())
    asked, recompute = settings.micro_batch_tokens, settings.gradient_checkpointing
    packs = settings.packing and _is_packable(model, recipe.task)
    trained = tuple(parameter for _, parameter in named if parameter.requires_grad)
    return StepRunner(
        model=model,
        optimizer=build_optimizer(named, settings, recipe.method),
        parameters=trained,
        pad_id=pad_id,
        micro_batch_tokens=AUTO_MICRO_BATCH_TOKENS if asked == "auto" else asked,
        max_gradient_norm=settings.max_gradient_norm,
        packs=packs,
        shares=packs and settings.share_prefixes and _is_shareable(model, recipe.task),
        recompute=OFF if recompute == "auto" else recompute,
        recompute_next=list_modes(model) if recompute == "auto" else (),
        places=build_places(trained),
        penalty=allocator.penalty if allocator else None,
        after_step=allocator.update if allocator else None,
    )


def _is_packable(model: nn.Module, task: str) -> bool:
    """Whether the model's answers stay the same when rows lie end to end."""
    facts = read_pack_facts(model)
    return facts.is_row_packable if task == "classify" else facts.is_packable


def _is_shareable(model: nn.Module, task: str) -> bool:
    """Whether a common opening can stand once for several samples.

    Under dropout each sample would draw its own mask of the opening, so one that stands
    for all is another computation: sharing is off.
    """
    return task != "classify" and not has_dropout(model) and read_pack_facts(model).is_shareable


def has_dropout(model: nn.Module) -> bool:
    """Whether any module drops values while it trains: nn.Dropout, or a rate of its own."""
    rates = (
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and (isinstance(module, nn.Dropout) or "drop" in name)
    )
    return any(rate > 0 for rate in rates)


def score_batch(model: nn.Module, batch: Batch, device: torch.device | str) -> Tensor:
    """The summed loss of a batch of tokens or of labelled rows."""
    ids_BT = torch.from_numpy(batch.ids_BT).to(device)
    attention_BT = torch.from_numpy(batch.attention_BT).to(device)
    if (batch.labels_B >= 0).all():
        labels_B = torch.from_numpy(batch.labels_B).to(device)
        return score_labels(model, ids_BT, attention_BT, labels_B)[0]
    mask_BT = torch.from_numpy(batch.mask_BT).to(device)
    return score_targets(model, ids_BT, attention_BT, mask_BT)[0]


def score_packed(model: nn.Module, pack: Pack, device: torch.device | str) -> Tensor:
    """The summed loss of a pack of tokens or of labelled rows."""
    is_labelled = bool((pack.labels_N >= 0).all())
    is_gpu = torch.device(device).type == "cuda"  # where a mask as an index would wait for it
    has_repeats = bool((pack.counts_T > 1).any())  # rows that are equal from end to end
    if pack.parents or has_repeats or (is_gpu and not is_labelled):
        return score_shared_pack(model, pack, device)
    ids_T = torch.from_numpy(pack.ids_T).to(device)
    positions_T = torch.from_numpy(pack.positions_T).to(device)
    if is_labelled:
        labels_N = torch.from_numpy(pack.labels_N).to(device)
        return score_pack_labels(model, ids_T, positions_T, pack.bounds, labels_N)[0]
    mask_T = torch.from_numpy(pack.counts_T > 0).to(device)
    return score_pack(model, ids_T, positions_T, mask_T, pack.bounds)[0]


def _norm_of(parameters: Sequence[nn.Parameter]) -> float:
    """The norm of all weights; not finite as soon as one weight is not."""
    return float(nn.utils.get_total_norm([parameter.detach() for parameter in parameters]))
