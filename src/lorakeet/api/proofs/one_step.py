"""The same 8 samples make one step from the same weights, cut in several ways.

Sums in another order round differently, so the figures are small and not zero:

    relative difference   max |g - g'| / max |g|            over each tensor, the largest
    of the update         ||u - u'|| / ||u||,  u = W' - W   all tensors together

Dropout is off, as each cut would draw other masks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.api.planning import check_data
from lorakeet.api.resolve import read_installed_versions, recipe_of_run, to_recipe
from lorakeet.api.session import pad_id_of
from lorakeet.base.errors import DataError
from lorakeet.base.proofs import Proof, find_excess, write_proof
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import EncodedSample
from lorakeet.base.run_folder import RunFolder

NUM_SAMPLES = 8
# Rounding of a sum: about 1e-7 in float32 and 4e-3 in bfloat16, times the depth of the model.
# Adam divides by sqrt(v), so gradients near zero keep their rounding error in the update.
LIMITS = {
    torch.float32: {"gradient_relative_difference": 1e-4, "update_relative_difference": 1e-2},
    torch.bfloat16: {"gradient_relative_difference": 5e-2, "update_relative_difference": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One way to put the 8 samples through the model.

    Args:
        size: samples in a micro-batch.
        packs: they lie end to end instead of padded.
        shares: what they open with alike is computed once, where the model can.
    """

    size: int
    packs: bool = False
    shares: bool = False

    @property
    def groups(self) -> list[list[int]]:
        """Positions among the samples that pass the model together."""
        return [list(range(i, i + self.size)) for i in range(0, NUM_SAMPLES, self.size)]


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """What a step did: gradients before clipping, the change of the weights, and its loss."""

    gradients: Mapping[str, Tensor]
    updates: Mapping[str, Tensor]
    loss: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The steps that were made, one a cut, and whether the model's documents can be packed."""

    steps: tuple[OneStep, ...]
    is_packable: bool


def prove_cuts(
    place: str | Path, cuts: Sequence[Cut], *, name: str, compared: str, unpacked: str = ""
) -> Proof:
    """Makes the step in each cut and compares all with the first.

    Args:
        place: a recipe file, or the folder of a run, which then gets the proof.
        unpacked: the note for a model that is never packed; its packed cuts are left out.

    Raises:
        DataError: there are fewer than 8 samples.
    """
    run = RunFolder(Path(place)) if Path(place).is_dir() else None
    recipe = recipe_of_run(run) if run else to_recipe(place)
    with tempfile.TemporaryDirectory(prefix="lorakeet-verify-") as folder:
        data = check_data(recipe, folder, emit=lambda kind, /, **_: None)
        samples = _choose_samples(data.train)
        bench = _make_steps(recipe, data.label_names, samples, cuts)
    first, *others = bench.steps
    kind = next(iter(first.gradients.values())).dtype
    limits = LIMITS.get(kind, LIMITS[torch.bfloat16])
    figures: dict[str, Any] = {
        "gradient_relative_difference": max(_largest(first.gradients, s.gradients) for s in others),
        "update_relative_difference": max(_norm_ratio(first.updates, s.updates) for s in others),
        "loss_difference": max(abs(first.loss - s.loss) for s in others),
        "num_samples": len(samples), "num_cuts": len(bench.steps),
        "num_tensors": len(first.gradients), "dtype": str(kind),
    }  # fmt: skip
    proof = Proof(
        name=name, compared=compared, figures=figures, tolerances=limits,
        problems=find_excess(figures, limits), versions=read_installed_versions(),
        notes=(unpacked,) if unpacked and not bench.is_packable else (),
    )  # fmt: skip
    if run:
        write_proof(run, proof)
    return proof


def _choose_samples(reader: Any) -> list[EncodedSample]:
    """Samples of as different lengths as there are, so that padding differs with the cut."""
    if len(reader) < NUM_SAMPLES:
        raise DataError(
            f"there are {len(reader)} training samples; this proof needs {NUM_SAMPLES}. Add rows."
        )
    ranked = sorted(range(len(reader)), key=lambda row: (int(reader.lengths[row]), row))
    places = [round(i * (len(ranked) - 1) / (NUM_SAMPLES - 1)) for i in range(NUM_SAMPLES)]
    return [reader[ranked[place]] for place in places]


def _make_steps(
    recipe: Recipe,
    label_names: tuple[str, ...],
    samples: list[EncodedSample],
    cuts: Sequence[Cut],
) -> Bench:
    """The step in each cut, every time from the same weights."""
    from lorakeet.models.load import load_model
    from lorakeet.models.methods import apply_method
    from lorakeet.models.packed import read_pack_facts
    from lorakeet.train.checkpoint import collect_state, restore_state

    torch.manual_seed(recipe.train.seed)
    model, tokenizer = load_model(
        recipe.base, task=recipe.task, label_names=label_names, quantization=recipe.quantization
    )
    apply_method(model, recipe.method, task=recipe.task, seed=recipe.train.seed, base=recipe.base)
    model.eval()
    _wake_adapters(model)
    facts = read_pack_facts(model)
    is_packable = facts.is_row_packable if recipe.task == "classify" else facts.is_packable
    start = collect_state(model)
    steps = []
    for cut in cuts:
        if cut.packs and not is_packable:
            continue
        restore_state(model, start)
        steps.append(_make_step(model, recipe, pad_id_of(tokenizer), samples, cut))
    return Bench(steps=tuple(steps), is_packable=is_packable)


def _wake_adapters(model: Any) -> None:
    """Draws every B that is zero, which would leave its A without a gradient."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                noise = torch.randn(parameter.shape, generator=draw) * 0.02
                parameter.copy_(noise.to(parameter))


def _make_step(
    model: Any, recipe: Recipe, pad_id: int, samples: list[EncodedSample], cut: Cut
) -> OneStep:
    """One optimiser step in one cut."""
    from lorakeet.train.checkpoint import collect_state
    from lorakeet.train.step import build_runner

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    before = collect_state(model)
    gradients: dict[str, Tensor] = {}
    runner = build_runner(model, recipe, pad_id=pad_id)
    runner = replace(
        runner, max_gradient_norm=float("inf"), packs=cut.packs,
        shares=cut.shares and runner.shares,
    )  # fmt: skip

    def keep(*_: Any) -> None:
        gradients.update({n: p.grad.detach().clone() for n, p in named if p.grad is not None})

    runner.optimizer.register_step_pre_hook(keep)
    loss = runner.run(samples, (recipe.train.seed, 1), cut.groups).loss
    after = collect_state(model)
    updates = {name: after[name] - before[name] for name in after}
    return OneStep(gradients=gradients, updates=updates, loss=loss)


def _largest(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """The largest difference of any tensor, over that tensor's largest magnitude."""
    pairs = [(one[name].double(), two[name].double()) for name in one]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs)


def _norm_ratio(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """The norm of the difference over the norm, all tensors as one vector."""
    apart = sum(float((one[n].double() - two[n].double()).square().sum()) for n in one)
    whole = sum(float(one[n].double().square().sum()) for n in one)
    return (apart / max(whole, 1e-300)) ** 0.5
