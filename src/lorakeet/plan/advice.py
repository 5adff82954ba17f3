"""Advice on a recipe: what would fail, and where evidence differs from what is asked."""

from __future__ import annotations

from lorakeet.base.recipe import Recipe
from lorakeet.plan.model_facts import ModelFacts
from lorakeet.plan.trained import TrainedCount


def advise(recipe: Recipe, facts: ModelFacts, counted: TrainedCount) -> list[str]:
    """Sentences for the user, what stops the training first."""
    return [*_list_mistakes(recipe, facts, counted), *_list_evidence(recipe, facts, counted)]


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
        advice.append("batch_size: LoRA bears more than about 32 samples a step badly.")
    if method.kind == "full" and train.learning_rate > 1e-4 and facts.parameters > 5e7:
        advice.append("learning_rate: full fine-tuning wants about a tenth of LoRA's rate.")
    return advice
