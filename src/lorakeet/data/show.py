"""Samples as the model sees them, with the trained tokens coloured."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from rich.text import Text

from lorakeet.base.recipe import Recipe
from lorakeet.base.records import EncodedSample
from lorakeet.data.encode import explain
from lorakeet.data.prepare import DataStage, encoded_samples, find_labels

TRAINED = "bold green"
GIVEN = "dim"


def legend() -> Text:
    """What the colours mean."""
    return Text.assemble(("trained", TRAINED), "  ", ("given, not trained", GIVEN))


def render_encoded(encoded: EncodedSample, tokenizer: Any) -> Text:
    """The text of a sample with its trained runs coloured.

    Trained runs also stand between ``⟦`` and ``⟧``, so that they show without colour.
    """
    text = Text()
    for run, is_trained in explain(encoded, tokenizer):
        text.append(f"⟦{run}⟧" if is_trained else run, style=TRAINED if is_trained else GIVEN)
    return text


def render_sources(
    recipe: Recipe, tokenizer: Any, *, skip: int, count: int
) -> Iterator[tuple[str, Text]]:
    """(title, text) of some samples of a recipe's sources.

    Raises:
        DataError: a source cannot be read.
    """
    stage = DataStage(recipe=recipe, tokenizer=tokenizer, emit=_quiet)
    stage.label_names = find_labels(recipe)
    encoded = (
        pair[0] for source in recipe.data.train for pair in encoded_samples(stage, source.path)
    )
    for sample in islice(encoded, skip, skip + count):
        label = f", label {stage.label_names[sample.label]}" if sample.label >= 0 else ""
        trained = int(sample.mask.sum())
        title = f"{sample.origin}: {len(sample.ids)} tokens, {trained} trained{label}"
        yield title, render_encoded(sample, tokenizer)


def _quiet(kind: str, /, **fields: Any) -> None:
    """Hears nothing."""
