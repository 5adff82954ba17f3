"""AdaLoRA: one rank budget for the whole model, spent where it matters.

    W' = W0 + (alpha / r) P Lambda Q         P: out x r,  Lambda: diagonal,  Q: r x in

P, Q and Lambda are called lora_B, lora_A and lora_E [r, 1], as in PEFT.  Three things
happen beside plain training; the training loop calls them, nobody else has to:

    penalty   gamma * mean over all P and Q of ||P^T P - I||_F, ||Q Q^T - I||_F
    scores    after each step, for each weight w with gradient g:
                  I = |w g|       Ibar = b1 Ibar + (1 - b1) I       Ubar = b2 Ubar + (1 - b2) |I - Ibar|
                  s(w) = Ibar Ubar
              a triplet i scores  s(Lambda_i) + mean s(P_i) + mean s(Q_i)
    budget    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))^3   triplets stay

Every ``every_steps`` the triplets below the budget get Lambda_i = 0; they may come back
until T - t_f, when the choice becomes final.  What is left is written as plain LoRA.

Source: arXiv:2303.10512, sections 3.1 to 3.3; the norm is not squared, as in its code.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakeet.adapters.attach import active_adapter, settings_of
from lorakeet.adapters.layer import LoraLayer
from lorakeet.adapters.settings import AdaLora
from lorakeet.base.errors import FileFormatError, RequestError


class RankAllocator:
    """The scores and the budget of one AdaLoRA adapter through a run.

    Args:
        num_steps: T, all optimiser steps of the run.

    Raises:
        RequestError: the run is too short to score anything.
    """

    def __init__(self, model: nn.Module, name: str, settings: AdaLora, num_steps: int) -> None:
        self.name, self.settings, self.num_steps = name, settings, num_steps
        self.layers = {
            path: layer
            for path, layer in model.named_modules()
            if isinstance(layer, LoraLayer) and name in layer.lora_E
        }
        self.first_step = int(settings.warmup_fraction * num_steps)  # t_i
        self.last_step = num_steps - int(settings.settle_fraction * num_steps)  # T - t_f
        if self.last_step < 2:
            raise RequestError(
                f"method.adalora: of {num_steps} steps the final ranks take all but "
                f"{self.last_step}, so no rank can be scored before it is taken away. Train "
                "longer, or lower adalora.settle_fraction."
            )
        self.first_budget = sum(layer.ranks[name] for layer in self.layers.values())
        self.last_budget = settings.target_rank * len(self.layers)
        self.importance: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def budget_at(self, step: int) -> int:
        """b(t): how many triplets of the whole model stay."""
        if step <= self.first_step:
            return self.first_budget
        span = self.last_step - self.first_step
        left = 1 - (min(step, self.last_step) - self.first_step) / span
        return int(self.last_budget + (self.first_budget - self.last_budget) * left**3)

    def is_settled(self, step: int) -> bool:
        """Whether the ranks after a step are the final ones."""
        return step >= self.last_step

    def penalty(self) -> Tensor:
        """gamma * mean ||P^T P - I||_F, which keeps P and Q near to orthogonal."""
        norms = []
        for layer in self.layers.values():
            A, B = layer.factors(self.name)
            identity = torch.eye(len(A), device=A.device, dtype=A.dtype)
            norms += [torch.linalg.norm(A @ A.T - identity), torch.linalg.norm(B.T @ B - identity)]
        return self.settings.orthogonality * torch.stack(norms).mean()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Scores and prunes; called after the optimiser's step, before gradients are cleared.

        Args:
            step: counted from 1.
        """
        if step < self.last_step:
            self._observe()
        is_due = self.first_step < step < self.last_step and step % self.settings.every_steps == 0
        if is_due or step == self.last_step:
            self._choose(self.budget_at(step))
        if is_due or self.is_settled(step):
            self._mask()

    def ranks(self) -> dict[str, int]:
        """The rank map: singular values of each module that are not zero."""
        return {path: layer.plain_rank(self.name) for path, layer in self.layers.items()}

    def to_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps so that a resumed run goes on exactly."""
        tables = {"importance": self.importance, "uncertainty": self.uncertainty, "kept": self.kept}
        return {f"{key}|{kind}": t for kind, table in tables.items() for key, t in table.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up a checkpoint's state.

        Raises:
            FileFormatError: it belongs to other modules than are trained.
        """
        tables = {"importance": self.importance, "uncertainty": self.uncertainty, "kept": self.kept}
        for key, tensor in tensors.items():
            owner, _, kind = key.rpartition("|")
            if kind in tables:
                tables[kind][owner] = tensor.to(self._device())
        if self.kept and self.kept.keys() != self.layers.keys():
            raise FileFormatError(
                "the checkpoint's ranks belong to other modules. Resume with the run's own recipe."
            )

    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).weight.device

    def _observe(self) -> None:
        """Smooths sensitivity and uncertainty of every weight of every triplet."""
        b1, b2 = self.settings.beta1, self.settings.beta2
        for path, layer in self.layers.items():
            for kind, weight in _triplets(layer, self.name).items():
                if weight.grad is None:
                    continue
                key, now = f"{path}.{kind}", (weight * weight.grad).abs()
                mean = self.importance.get(key, torch.zeros_like(now))
                self.importance[key] = mean = b1 * mean + (1 - b1) * now
                spread = self.uncertainty.get(key, torch.zeros_like(now))
                self.uncertainty[key] = b2 * spread + (1 - b2) * (now - mean).abs()

    def _choose(self, budget: int) -> None:
        """The best triplets of the whole model, exactly as many as the budget."""
        scores = {path: self._score(path) for path in self.layers}
        best = torch.cat(list(scores.values())).argsort(descending=True, stable=True)[:budget]
        kept = torch.zeros(self.first_budget, dtype=torch.bool, device=best.device)
        kept[best] = True
        parts = kept.split([len(score) for score in scores.values()])
        self.kept = {path: part.clone() for path, part in zip(scores, parts, strict=True)}

    def _score(self, path: str) -> Tensor:
        """The score of each triplet of a module, [r]."""
        r = self.layers[path].ranks[self.name]
        total = torch.zeros(r, device=self._device())
        for kind, dim in (("E", 1), ("A", 1), ("B", 0)):
            key = f"{path}.{kind}"
            if key in self.importance:
                total += (self.importance[key] * self.uncertainty[key]).mean(dim)
        return total

    def _mask(self) -> None:
        for path, layer in self.layers.items():
            layer.lora_E[self.name].masked_fill_(~self.kept[path][:, None], 0.0)


def build_allocator(model: nn.Module, num_steps: int) -> RankAllocator | None:
    """The allocator of the active adapter, or None when that is not AdaLoRA."""
    name = active_adapter(model)
    settings = settings_of(model)[name].adalora if name else None
    return RankAllocator(model, name, settings, num_steps) if settings else None


def _triplets(layer: LoraLayer, name: str) -> dict[str, Tensor]:
    """Lambda [r, 1], Q [r, in] and P [out, r] of a layer."""
    A, B = layer.factors(name)
    return {"E": layer.lora_E[name], "A": A, "B": B}
