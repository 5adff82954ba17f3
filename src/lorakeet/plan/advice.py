"""Advice on a recipe: what would fail, and where evidence differs from what is asked.

The rank follows from the data.  An adapter of P parameters holds about 2 P bits
(arXiv:2404.05405) and a trained token brings about 1 bit (LoRA Without Regret,
2025), so all of the data can be learned when

    2 P >= tokens,     P = r * sum over adapted modules of (in + out)
"""

from __future__ import annotations

import math

from lorakeet.base.recipe import Recipe
from lorakeet.plan.model_facts import ModelFacts
from lorakeet.plan.trained import TrainedCount

BITS_PER_PARAMETER = 2
BITS_PER_TOKEN = 1
_SOURCE = "LoRA Without Regret, 2025"


def advise(recipe: Recipe, facts: ModelFacts, counted: TrainedCount) -> list[str]:
    """Sentences for the user, what stops the training first."""
    return [*_list_mistakes(recipe, facts, counted), *_list_evidence(recipe, facts, counted)]


def advise_rank(recipe: Recipe, counted: TrainedCount, trained_tokens: int) -> str:
    """What rank the trained tokens of one pass over the data ask for.

    Args:
        trained_tokens: targets; repeating them in another epoch brings nothing new.
    """
    rank, of_a_rank = recipe.method.rank, counted.adapter_parameters / recipe.method.rank
    if not of_a_rank:
        return "rank: the targets match no module, so there is none to advise on."
    needed = max(1, math.ceil(trained_tokens * BITS_PER_TOKEN / BITS_PER_PARAMETER / of_a_rank))
    held = f"rank {rank} holds about {BITS_PER_PARAMETER * counted.adapter_parameters:,.0f} bits"
    brings = f"the data bring about {BITS_PER_TOKEN * trained_tokens:,} ({trained_tokens:,} tokens)"
    if needed > rank:
        return (
            f"{held}, and {brings}. Rank {needed} could learn all of it, with method.rslora: true "
            f"above 32; a lower one learns what is common to many rows ({_SOURCE})."
        )
    return (
        f"{held}, and {brings}: rank {needed} would do. A higher one does not hurt, and the best "
        f"learning rate is nearly the same ({_SOURCE})."
    )


def _list_mistakes(recipe: Recipe, facts: ModelFacts, counted: TrainedCount) -> list[str]:
    """Names in the recipe that the model does not have."""
    method, mistakes = recipe.method, []
    if method.kind != "lora":
        return []
    if counted.num_targets == 0:
        asked = method.targets if isinstance(method.targets, str) else ", ".join(method.targets)
        endings = {p.path.rsplit(".", 1)[-1] for p in facts.parts if p.kind == "linear"}
        mistakes.append(
            f"targets: {asked} matches no module of this model, so nothing would be adapted. Its "
            f"linear layers end in {', '.join(sorted(endings))}."
        )
    if counted.missing_saved:
        mistakes.append(
            f"modules_to_save: {', '.join(counted.missing_saved)} matches no module of this model."
        )
    return mistakes


def _list_evidence(recipe: Recipe, facts: ModelFacts, counted: TrainedCount) -> list[str]:
    """Settings that common guidance speaks against."""
    method, train = recipe.method, recipe.train
    advice = []
    num_linear = sum(part.count for part in facts.parts if part.kind == "linear")
    if method.kind == "lora" and facts.is_decoder and 0 < counted.num_targets < num_linear:
        advice.append(
            "targets: adapting all linear layers is better than attention only, even at equal "
            "parameter count (arXiv:2405.09673)."
        )
    if method.kind == "lora" and method.rank > 32 and not method.rslora:
        advice.append(
            f"rank {method.rank} with alpha / r shrinks the change; method.rslora: true scales by "
            "alpha / sqrt(r) (arXiv:2312.03732)."
        )
    if method.kind == "lora" and train.batch_size > 32:
        advice.append(
            "batch_size: LoRA bears more than about 32 samples a step badly, even where memory "
            f"would hold them ({_SOURCE})."
        )
    if method.kind == "full" and train.learning_rate > 1e-4 and facts.parameters > 5e7:
        advice.append(
            f"learning_rate: full fine-tuning wants about a tenth of LoRA's rate ({_SOURCE})."
        )
    if method.kind == "lora" and train.learning_rate < 5e-5:
        advice.append(
            f"learning_rate: {train.learning_rate:g} is a rate for full fine-tuning; LoRA's best "
            f"is about ten times that, whatever the rank ({_SOURCE}). 'lorakeet plan "
            "--learning-rate' tries some."
        )
    if train.epochs > 5 and train.early_stopping is None:
        advice.append(
            f"epochs {train.epochs:g} without early_stopping: after about four passes repeated "
            "rows bring little (arXiv:2305.16264), and small models learn them by heart."
        )
    return advice
