"""The data stage: from the recipe's sources to shards, a report and a list of dropped rows.

    read -> recognise -> clean -> mask private data -> deduplicate -> encode -> split -> shards

Every row that does not arrive is in ``dropped.jsonl`` with file, line and reason.
Validation rows are chosen by a hash of their content, so the split survives new
rows and another order, and equal texts never stand on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lorakeet.base.errors import DataError, FileFormatError, RowError
from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import Conversation, DroppedRow, EncodedSample, RawRow, Sample, Turn
from lorakeet.base.run_folder import read_json, sha256_file, write_json, write_text
from lorakeet.base.stamps import fingerprint
from lorakeet.data.clean import clean_sample, texts_of
from lorakeet.data.dedup import Deduplicator, content_hash
from lorakeet.data.encode import Tokenizer, encode_sample
from lorakeet.data.fields import schema_name
from lorakeet.data.lint import DataLinter
from lorakeet.data.privacy import mask_sample
from lorakeet.data.schemas import to_sample
from lorakeet.data.shards import ShardReader, write_shards
from lorakeet.data.sources import list_files, read_rows

MIN_ROWS_TO_SPLIT = 20
_PREVIEW_CHARS = 120
_PROGRESS_EVERY_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What training reads.

    Args:
        label_names: the classes in the order of their indices; empty for language models.
        report: the linter's report with hashes of the sources.
    """

    train: ShardReader
    validation: ShardReader
    label_names: tuple[str, ...]
    report: dict[str, Any]


@dataclass
class DataStage:
    """One pass over the sources: settings, tokenizer and what has been counted."""

    recipe: Recipe
    tokenizer: Tokenizer
    emit: Emit
    label_names: tuple[str, ...] = ()
    linter: DataLinter = field(default_factory=DataLinter)
    dropped: list[DroppedRow] = field(default_factory=list)
    duplicates: Deduplicator = field(default_factory=Deduplicator)

    def drop(self, row: DroppedRow) -> None:
        """Notes a row that is not used whole."""
        self.dropped.append(row)
        self.linter.add_dropped(row)


def prepare_data(recipe: Recipe, tokenizer: Tokenizer, folder: Path, emit: Emit) -> PreparedData:
    """Shards of everything that a recipe trains and validates on.

    Args:
        folder: gets ``train/``, ``validation/``, ``report.json``, ``dropped.jsonl``; what a
            former call on the same inputs left there is taken as it is.

    Raises:
        DataError: nothing is left to train on (with the most frequent reasons), or a
            source cannot be read.
    """
    digest = _digest_inputs(recipe, tokenizer)
    report_path = folder / "report.json"
    if report_path.is_file():
        try:
            report = read_json(report_path)
            if isinstance(report, dict) and report.get("inputs") == digest:
                return _open(folder, report)
        except FileFormatError as error:
            emit("alarm", code="damaged-data", step=0,
                 message=f"{error} They are built again from the sources.")  # fmt: skip
    stage = DataStage(recipe=recipe, tokenizer=tokenizer, emit=emit)
    stage.label_names = find_labels(stage)
    _write_splits(stage, folder)
    lines = (json.dumps(_to_line(row), ensure_ascii=False) + "\n" for row in stage.dropped)
    write_text(folder / "dropped.jsonl", "".join(lines))
    report = _make_report(stage, folder, digest)
    if not report["num_train"]:
        raise DataError(_nothing_left(stage))
    write_json(report_path, report)
    told = ("num_train", "num_validation", "num_dropped", "warnings", "tokens")
    emit("data_report", **{name: report[name] for name in told})
    return _open(folder, report)


def iterate_samples(
    stage: DataStage, path: str, *, keep_count: bool = True
) -> Iterator[tuple[Sample, str]]:
    """Clean samples of one source with the name of their schema; the others are dropped."""
    settings = stage.recipe.data
    for number, row in enumerate(read_rows(path, stage.drop), 1):
        if keep_count and number % _PROGRESS_EVERY_ROWS == 0:
            stage.emit("progress", stage="data", done=number, total=0)
        try:
            sample = to_sample(row, task=stage.recipe.task, settings=settings)
        except RowError as error:
            stage.drop(_to_dropped(row, error))
            continue
        sample = clean_sample(sample) if settings.clean else sample
        sample = _with_system(sample, settings.system)
        if settings.private_data == "mask":
            sample, counts = mask_sample(sample)
            stage.linter.add_masked(counts)
        first = stage.duplicates.is_duplicate(sample) if settings.deduplicate else None
        if first is not None:
            error = RowError(f"the same text as {first}.", code="duplicate")
            stage.drop(_to_dropped(row, error))
            continue
        yield sample, schema_name(row.fields)


def encoded_samples(stage: DataStage, path: str) -> Iterator[tuple[EncodedSample, Sample]]:
    """Encoded samples of one source, each with the text it came from."""
    for sample, schema in iterate_samples(stage, path):
        try:
            encoded = _encode(stage, sample, too_long="drop")
        except RowError as error:
            stage.drop(_to_dropped(sample, error))
            if error.code != "cut":
                continue
            encoded = _encode(stage, sample, too_long="cut")
        stage.linter.add_sample(sample, schema)
        stage.linter.add_encoded(encoded)
        yield encoded, sample


def _encode(stage: DataStage, sample: Sample, *, too_long: str) -> EncodedSample:
    """A sample in the recipe's window.

    Raises:
        RowError: it cannot be encoded; with code ``cut`` when cutting is what is asked for.
    """
    settings = stage.recipe.data
    try:
        return encode_sample(
            sample, stage.tokenizer, max_tokens=settings.max_tokens,
            too_long=too_long, label_names=stage.label_names,
        )  # fmt: skip
    except RowError as error:
        if error.code == "too-long" and settings.too_long == "cut":
            reason = f"{error.reason} The end is cut off and not trained."
            raise RowError(reason, code="cut") from error
        raise


def is_for_validation(sample: Sample, share: float) -> bool:
    """Whether the hash of a sample's content falls into the validation share."""
    return int.from_bytes(content_hash(sample)[:6], "big") < share * 256**6


def _write_splits(stage: DataStage, folder: Path) -> None:
    """Train and validation shards; a share is split off as the rows pass."""
    share = stage.recipe.data.validation
    held_back: list[tuple[EncodedSample, int]] = []

    def to_train() -> Iterator[tuple[EncodedSample, int]]:
        for number, source in enumerate(stage.recipe.data.train):
            for encoded, sample in encoded_samples(stage, source.path):
                if isinstance(share, float) and is_for_validation(sample, share):
                    held_back.append((encoded, number))
                else:
                    yield encoded, number

    write_shards(to_train(), folder / "train")
    if isinstance(share, str):
        held_back = [(encoded, 0) for encoded, _ in encoded_samples(stage, share)]
    write_shards(held_back, folder / "validation")


def find_labels(stage: DataStage) -> tuple[str, ...]:
    """The classes of a classification task: as given, or as found in a first pass."""
    if stage.recipe.task != "classify":
        return ()
    if stage.recipe.data.labels:
        return stage.recipe.data.labels
    trial = DataStage(recipe=stage.recipe, tokenizer=stage.tokenizer, emit=stage.emit)
    found = {
        sample.label
        for source in stage.recipe.data.train
        for sample, _ in iterate_samples(trial, source.path, keep_count=False)
    }
    if len(found) < 2:
        raise DataError(
            f"the training rows have {len(found)} different labels ({', '.join(sorted(found))}); "
            "a classifier needs at least two. Check data.label_column."
        )
    return tuple(sorted(found, key=lambda name: (not name.isdigit(), name.zfill(12))))


def _make_report(stage: DataStage, folder: Path, digest: str) -> dict[str, Any]:
    """The linter's report with the split, the labels and the hashes."""
    report = stage.linter.to_report()
    files = {
        str(file): sha256_file(file)
        for path in source_paths(stage.recipe)
        for file in list_files(path)
    }
    return {
        **report,
        "num_train": len(ShardReader(folder / "train")),
        "num_validation": len(ShardReader(folder / "validation")),
        "label_names": list(stage.label_names),
        "fingerprint": {"files": files, "chat_template": _digest_template(stage.tokenizer)},
        "inputs": digest,
    }


def _open(folder: Path, report: dict[str, Any]) -> PreparedData:
    """The shards of a folder."""
    return PreparedData(
        train=ShardReader(folder / "train"),
        validation=ShardReader(folder / "validation"),
        label_names=tuple(report["label_names"]),
        report=report,
    )


def source_paths(recipe: Recipe) -> list[str]:
    """Every path that rows are read from: training first, then validation when it is a path."""
    paths = [source.path for source in recipe.data.train]
    return [*paths, *([v] if isinstance(v := recipe.data.validation, str) else [])]


def _digest_inputs(recipe: Recipe, tokenizer: Tokenizer) -> str:
    """One digest over all that the data stage reads."""
    files = [
        (str(file), sha256_file(file)) for path in source_paths(recipe) for file in list_files(path)
    ]
    probe = tokenizer("Lorakeet 你好 1234\n")["input_ids"]
    return fingerprint(
        files, recipe.task, recipe.data.model_dump(mode="json"), _digest_template(tokenizer),
        list(probe), len(tokenizer),  # type: ignore[arg-type]
    )  # fmt: skip


def _digest_template(tokenizer: Tokenizer) -> str:
    """The hash of the chat template, by which training and serving can be compared."""
    return fingerprint(str(tokenizer.chat_template))


def _with_system(sample: Sample, system: str | None) -> Sample:
    """A conversation that opens with the recipe's system prompt when it has none."""
    if not system or not isinstance(sample, Conversation) or sample.turns[0].role == "system":
        return sample
    return replace(sample, turns=(Turn(role="system", content=system), *sample.turns))


def _to_dropped(row: RawRow | Sample, error: RowError) -> DroppedRow:
    """The note of a row that is not used."""
    text = str(row.fields) if isinstance(row, RawRow) else " | ".join(texts_of(row))
    return DroppedRow(
        origin=row.origin, code=error.code, reason=error.reason, preview=text[:_PREVIEW_CHARS]
    )


def _to_line(row: DroppedRow) -> dict[str, Any]:
    """One line of ``dropped.jsonl``."""
    return {"file": row.origin.path, "line": row.origin.line, **asdict(row)} | {
        "origin": str(row.origin)
    }


def _nothing_left(stage: DataStage) -> str:
    """Why there is nothing to train on: the most frequent reasons with an example."""
    reasons = stage.linter.to_report()["dropped"]
    listed = "\n".join(
        f"  {entry['rows']} x {code}, such as {entry['example']}"
        for code, entry in list(reasons.items())[:5]
    )
    return f"nothing is left to train on; {len(stage.dropped)} rows were dropped:\n{listed}"
