"""How far a merged model is from what was trained, where training held the base in few bits."""

from __future__ import annotations

from pathlib import Path

from lorakeet.adapters.files import read_adapter
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.export.compare import compare_outputs
from lorakeet.export.fresh import measure_outputs
from lorakeet.export.proof import Written
from lorakeet.models.load import load_model

FIGURES = ("max_relative_difference", "mean_kl", "top1_agreement")


def measure_drift(
    base: str, adapter_folder: Path, trained_on: QuantizationSettings, written: Written
) -> dict[str, float | bool | int]:
    """Figures of the quantised base + adapter against what the merged model must answer.

    Args:
        written: with its expected answers.

    Returns:
        ``drift_*``: the largest difference over the largest logit, KL in nats, and the share
        of positions with the same first choice.

    Cost: the quantised model in memory, and its answers to the fixed prompts.
    """
    request = written.request
    model, tokenizer = load_model(
        base, task=request.task, label_names=request.label_names, dtype="float32",
        quantization=trained_on,
    )  # fmt: skip
    read_adapter(model, adapter_folder)
    figures = compare_outputs(measure_outputs(model, tokenizer, request), written.expected)
    return {f"drift_{name}": figures[name] for name in FIGURES if name in figures}
