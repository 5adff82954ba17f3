"""A run of rows turned into encoded samples: a pure function, so it may run anywhere.

    recognise -> clean -> system prompt -> mask private data -> hash -> encode

What depends on the rows before (duplicates, counts) is left to the caller, who sees the
outcomes in the order of the rows.  That is why the shards do not depend on how many
processes made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorakeet.base.errors import RowError
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import Conversation, DroppedRow, EncodedSample, RawRow, Sample, Turn
from lorakeet.data.clean import clean_sample, texts_of
from lorakeet.data.dedup import content_hash
from lorakeet.data.encode import Met, encode_sample, encode_samples
from lorakeet.data.fields import schema_name
from lorakeet.data.lint import SampleFacts, read_facts
from lorakeet.data.privacy import mask_sample
from lorakeet.data.render import Tokenizer
from lorakeet.data.schemas import to_sample

PREVIEW_CHARS = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a row.

    Args:
        refused: why the row holds no sample; everything else is then empty.
        key: the hash of the sample's content.
        masked: private data by kind.
        notes: why the sample is not used, or only in part; for the caller to write down
            when the row is no duplicate.
    """

    refused: DroppedRow | None = None
    key: bytes = b""
    masked: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[DroppedRow, ...] = ()
    encoded: EncodedSample | None = None
    facts: SampleFacts | None = None


@dataclass(frozen=True, kw_only=True)
class ChunkEncoder:
    """How the rows of a recipe become encoded samples; call it with a run of rows.

    Args:
        label_names: the classes in the order of their indices; empty for language models.
        met: what the tokenizer has met; it changes no result.
    """

    recipe: Recipe
    tokenizer: Tokenizer
    label_names: tuple[str, ...] = ()
    met: Met | None = None

    def __call__(self, rows: Sequence[RawRow]) -> list[Outcome]:
        """An outcome for each row, in their order.

        Raises:
            DataError: the tokenizer has no chat template and a row is a conversation.
        """
        read = [self._read(row) for row in rows]
        samples = [sample for sample in read if not isinstance(sample, Outcome)]
        found = iter(zip(samples, self._encode([s for s, *_ in samples]), strict=True))
        outcomes = []
        for row, sample in zip(rows, read, strict=True):
            if isinstance(sample, Outcome):
                outcomes.append(sample)
                continue
            (text, masked), encoded = next(found)
            outcomes.append(self._conclude(text, masked, encoded, schema_name(row.fields)))
        return outcomes

    def _read(self, row: RawRow) -> tuple[Sample, Mapping[str, int]] | Outcome:
        """The sample of a row as it will be trained, or the outcome of a row without one."""
        settings = self.recipe.data
        try:
            sample = to_sample(row, task=self.recipe.task, settings=settings)
        except RowError as error:
            return Outcome(refused=to_dropped(row, error))
        sample = clean_sample(sample) if settings.clean else sample
        sample = _with_system(sample, settings.system)
        if settings.private_data == "mask":
            return mask_sample(sample)
        return sample, {}

    def _encode(self, samples: Sequence[Sample]) -> list[EncodedSample | RowError]:
        return encode_samples(
            samples, self.tokenizer, max_tokens=self.recipe.data.max_tokens,
            label_names=self.label_names, met=self.met,
        )  # fmt: skip

    def _conclude(
        self,
        sample: Sample,
        masked: Mapping[str, int],
        encoded: EncodedSample | RowError,
        schema: str,
    ) -> Outcome:
        """The outcome of a sample; a longer one is cut here when cutting is asked for."""
        notes = []
        if isinstance(encoded, RowError):
            is_cut = encoded.code == "too-long" and self.recipe.data.too_long == "cut"
            if is_cut:
                reason = f"{encoded.reason} The end is cut off and not trained."
                encoded = RowError(reason, code="cut")
            notes.append(to_dropped(sample, encoded))
            if is_cut:
                try:
                    encoded = encode_sample(
                        sample, self.tokenizer, max_tokens=self.recipe.data.max_tokens,
                        too_long="cut", label_names=self.label_names,
                    )  # fmt: skip
                except RowError as error:  # nothing of what is left would be trained
                    notes = [to_dropped(sample, error)]
        whole = encoded if isinstance(encoded, EncodedSample) else None
        return Outcome(
            key=content_hash(sample), masked=masked, notes=tuple(notes), encoded=whole,
            facts=read_facts(sample, schema) if whole else None,
        )  # fmt: skip


def to_dropped(row: RawRow | Sample, error: RowError) -> DroppedRow:
    """The note of a row that is not used."""
    text = str(row.fields) if isinstance(row, RawRow) else " | ".join(texts_of(row))
    return DroppedRow(
        origin=row.origin, code=error.code, reason=error.reason, preview=text[:PREVIEW_CHARS]
    )


def _with_system(sample: Sample, system: str | None) -> Sample:
    """A conversation that opens with the recipe's system prompt when it has none."""
    if not system or not isinstance(sample, Conversation) or sample.turns[0].role == "system":
        return sample
    return replace(sample, turns=(Turn(role="system", content=system), *sample.turns))
