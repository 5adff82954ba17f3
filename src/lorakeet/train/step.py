"""One optimiser step: many micro-batches, one token count, one division.

    g = (1 / n) sum over micro-batches of d loss_sum / d theta,   n = targets of the step

The count n is taken over the whole step before the first micro-batch runs, so how
the step is cut into micro-batches changes memory and nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakeet.base.errors import NumericsError
from lorakeet.base.records import Batch, EncodedSample, Pack
from lorakeet.data.collate import collate
from lorakeet.data.order import split_micro_batches
from lorakeet.data.packing import build_pack, pack_rows
from lorakeet.models.score import score_labels, score_pack, score_pack_labels, score_targets


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
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: tuple[nn.Parameter, ...]
    pad_id: int
    micro_batch_tokens: int
    max_gradient_norm: float
    packs: bool = False

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
            NumericsError: loss or gradient is not finite; the optimiser has not stepped.
        """
        started_s = time.perf_counter()
        lengths = [len(sample.ids) for sample in samples]
        groups = groups or self._cut(lengths)
        batches = [self._build([samples[i] for i in group]) for group in groups]
        num_targets = sum(batch.num_targets for batch in batches)
        with _own_randomness(self.parameters[0].device, hash_seed(*seed)):
            losses = self._accumulate(batches, num_targets)
        loss = sum(losses) / num_targets
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_gradient_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            bad = [i for group, part in zip(groups, losses, strict=True)
                   if not math.isfinite(part) for i in group]  # fmt: skip
            raise _not_finite(loss, norm, [samples[i] for i in bad] or samples, seed[1])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss, gradient_norm=norm, num_targets=num_targets, num_tokens=sum(lengths),
            duration_s=time.perf_counter() - started_s,
        )  # fmt: skip

    def _cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """The rows of a step in micro-batches, as positions within the step."""
        cut = pack_rows if self.packs else split_micro_batches
        return cut(lengths, self.micro_batch_tokens)

    def _build(self, samples: Sequence[EncodedSample]) -> Batch | Pack:
        return build_pack(samples) if self.packs else collate(samples, self.pad_id)

    def _accumulate(self, batches: Sequence[Batch | Pack], num_targets: int) -> list[float]:
        """Adds up the gradients of all micro-batches; returns the summed loss of each."""
        device = self.parameters[0].device
        losses = []
        for batch in batches:
            score = score_packed if isinstance(batch, Pack) else score_batch
            loss_sum = score(self.model, batch, device)
            (loss_sum / num_targets).backward()
            losses.append(loss_sum.detach())
        return torch.stack(losses).tolist()  # one wait for the device a step


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
    ids_T = torch.from_numpy(pack.ids_T).to(device)
    positions_T = torch.from_numpy(pack.positions_T).to(device)
    if (pack.labels_N >= 0).all():
        labels_N = torch.from_numpy(pack.labels_N).to(device)
        return score_pack_labels(model, ids_T, positions_T, pack.bounds, labels_N)[0]
    mask_T = torch.from_numpy(pack.mask_T).to(device)
    return score_pack(model, ids_T, positions_T, mask_T, pack.bounds)[0]


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers that depend on the seed alone; the caller's generator is untouched."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def hash_seed(seed: int, step: int) -> int:
    """A 63-bit seed from the run's seed and the step, by SplitMix64's mixing."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


def _not_finite(
    loss: float, norm: float, samples: Sequence[EncodedSample], step: int
) -> NumericsError:
    """The error of a step that must not happen, with the rows it saw."""
    rows = ", ".join(str(sample.origin) for sample in samples[:4])
    more = f" and {len(samples) - 4} more" if len(samples) > 4 else ""
    return NumericsError(
        f"step {step}: the loss is {loss} and the gradient norm {norm}; needed are finite numbers. "
        f"The weights are untouched. The rows were {rows}{more}. Lower train.learning_rate, and "
        "look at these rows with 'lorakeet data show'."
    )
