"""The data stage: from the recipe's sources to shards, a report and a list of dropped rows.

    read -> recognise -> clean -> mask private data -> deduplicate -> encode -> split -> shards

Every row that does not arrive is in ``dropped.jsonl`` with file, line and reason.
Validation rows are chosen by a hash of their content, so the split survives new
rows and another order, and equal texts never stand on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.base.errors import DataError, FileFormatError, RowError
from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.base.records import DroppedRow, EncodedSample, RawRow
from lorakeet.base.run_folder import open_to_replace, read_json, sha256_file, write_json
from lorakeet.base.stamps import fingerprint
from lorakeet.data.chunk import ChunkEncoder, to_dropped
from lorakeet.data.dedup import Deduplicator
from lorakeet.data.encode import Met
from lorakeet.data.encodings import find_guess
from lorakeet.data.lint import DataLinter
from lorakeet.data.render import Tokenizer
from lorakeet.data.schemas import to_sample
from lorakeet.data.shards import ShardReader, ShardWriter
from lorakeet.data.sources import list_files, read_rows
from lorakeet.data.workers import count_workers, map_pieces

MIN_ROWS_TO_SPLIT = 20
_ROWS_OF_A_CHUNK = 256
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
    """One pass over the sources: settings, tokenizer and what has been counted.

    Args:
        write_dropped: gets each line of ``dropped.jsonl``.
        num_workers: processes that encode rows beside this one.
    """

    recipe: Recipe
    tokenizer: Tokenizer
    emit: Emit
    write_dropped: Callable[[str], object] = len
    num_workers: int = 0
    label_names: tuple[str, ...] = ()
    linter: DataLinter = field(default_factory=DataLinter)
    duplicates: Deduplicator = field(default_factory=Deduplicator)
    met: Met | None = None

    def drop(self, row: DroppedRow) -> None:
        """Notes a row that is not used whole."""
        self.write_dropped(json.dumps(_to_line(row), ensure_ascii=False) + "\n")
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
    with open_to_replace(folder / "dropped.jsonl") as dropped:
        asked = recipe.data.workers
        stage = DataStage(
            recipe=recipe, tokenizer=tokenizer, emit=emit, write_dropped=dropped.write,
            num_workers=count_workers() if asked == "auto" else asked,
            met=Met.of(tokenizer),
        )  # fmt: skip
        stage.label_names = find_labels(recipe)
        _write_splits(stage, folder)
    report = _make_report(stage, folder, digest)
    if not report["num_train"]:
        raise DataError(_nothing_left(stage))
    write_json(report_path, report)
    told = ("num_train", "num_validation", "num_dropped", "warnings", "tokens")
    emit("data_report", **{name: report[name] for name in told})
    return _open(folder, report)


def encoded_samples(stage: DataStage, path: str) -> Iterator[tuple[EncodedSample, bytes]]:
    """Encoded samples of one source, each with the hash of its content; the others are dropped."""
    encoder = ChunkEncoder(
        recipe=stage.recipe, tokenizer=stage.tokenizer, label_names=stage.label_names,
        met=stage.met,
    )  # fmt: skip
    finds_duplicates, number = stage.recipe.data.deduplicate, 0
    notes: dict[int, list[DroppedRow]] = {}
    for rows, outcomes in map_pieces(encoder, _chunks(path, notes), stage.num_workers):
        for row, outcome in zip(rows, outcomes, strict=True):
            for unread in notes.pop(number, ()):
                stage.drop(unread)
            number += 1
            if number % _PROGRESS_EVERY_ROWS == 0:
                stage.emit("progress", stage="data", done=number, total=0)
            if outcome.refused is not None:
                stage.drop(outcome.refused)
                continue
            stage.linter.add_masked(outcome.masked)
            first = (
                stage.duplicates.find_first(outcome.key, row.origin) if finds_duplicates else None
            )
            if first is not None:
                error = RowError(f"the same text as {first}.", code="duplicate")
                stage.drop(to_dropped(row, error))
                continue
            for note in outcome.notes:
                stage.drop(note)
            if outcome.encoded is not None:
                stage.linter.add_facts(outcome.facts)
                stage.linter.add_encoded(outcome.encoded)
                yield outcome.encoded, outcome.key
    for unread in notes.pop(number, ()):
        stage.drop(unread)


def _chunks(path: str, notes: dict[int, list[DroppedRow]]) -> Iterator[list[RawRow]]:
    """The rows of a source in runs; what could not be read is noted under the row that follows."""
    number = 0
    rows: list[RawRow] = []

    def note(row: DroppedRow) -> None:
        notes.setdefault(number, []).append(row)

    for row in read_rows(path, note):
        rows.append(row)
        number += 1
        if len(rows) == _ROWS_OF_A_CHUNK:
            yield rows
            rows = []
    if rows:
        yield rows


def is_for_validation(key: bytes, share: float) -> bool:
    """Whether the hash of a sample's content falls into the validation share."""
    return int.from_bytes(key[:6], "big") < share * 256**6


def _write_splits(stage: DataStage, folder: Path) -> None:
    """Train and validation shards; a share is split off as the rows pass."""
    share = stage.recipe.data.validation
    with (
        ShardWriter(folder / "train") as train,
        ShardWriter(folder / "validation") as validation,
    ):
        for number, source in enumerate(stage.recipe.data.train):
            for encoded, key in encoded_samples(stage, source.path):
                is_held = isinstance(share, float) and is_for_validation(key, share)
                (validation if is_held else train).add(encoded, number)
        if isinstance(share, str):
            for encoded, _ in encoded_samples(stage, share):
                validation.add(encoded, 0)


def find_labels(recipe: Recipe) -> tuple[str, ...]:
    """The classes of a classification task: as given, or as found in a first pass."""
    if recipe.task != "classify":
        return ()
    if recipe.data.labels:
        return recipe.data.labels
    found = set()
    for source in recipe.data.train:
        for row in read_rows(source.path, _pass_over):
            try:
                found.add(to_sample(row, task="classify", settings=recipe.data).label)
            except RowError:
                continue  # the second pass tells
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
    guesses = {file: guess for file in files if (guess := find_guess(Path(file)))}
    return {
        **report,
        "warnings": [*report["warnings"], *map(_tell_guess, guesses.items())],
        "guessed_encodings": guesses,
        "num_train": len(ShardReader(folder / "train")),
        "num_validation": len(ShardReader(folder / "validation")),
        "label_names": list(stage.label_names),
        "fingerprint": {"files": files, "chat_template": _digest_template(stage.tokenizer)},
        "inputs": digest,
    }


def _tell_guess(found: tuple[str, str]) -> str:
    """What to do about a file whose encoding had to be guessed."""
    path, encoding = found
    return (
        f"{path} is not UTF-8; it was read as {encoding}, which is a guess. Look at it with "
        f"'lorakeet data show {path}', and save it as UTF-8 where characters are wrong."
    )


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
    settings = recipe.data.model_dump(mode="json", exclude={"workers"})
    probe = tokenizer("Lorakeet 你好 1234\n")["input_ids"]
    return fingerprint(
        files, recipe.task, settings, _digest_template(tokenizer),
        list(probe), len(tokenizer),  # type: ignore[arg-type]
    )  # fmt: skip


def _digest_template(tokenizer: Tokenizer) -> str:
    """The hash of the chat template, by which training and serving can be compared."""
    return fingerprint(str(tokenizer.chat_template))


def _pass_over(_row: DroppedRow) -> None:
    """Leaves the telling of a dropped row to the second pass."""


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
    number = sum(entry["rows"] for entry in reasons.values())
    return f"nothing is left to train on; {number} rows were dropped:\n{listed}"
