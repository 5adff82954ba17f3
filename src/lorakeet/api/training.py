"""Train and resume: the walk of a sample from a file to an adapter on disk.

    recipe -> data/ (shards) -> plan.json -> model + method -> train_model -> adapter/

Each arrow leaves files in the run folder.  Nothing here computes: the floors do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lorakeet.api.continuing import check_parent
from lorakeet.api.data_facts import settle_micro_batch
from lorakeet.api.planning import describe_frozen_cache, make_run_plan
from lorakeet.api.resolve import (
    RecipeLike,
    describe_other_data,
    read_resolved,
    recipe_to_resume,
    to_recipe,
    write_resolved,
)
from lorakeet.api.runs import record
from lorakeet.api.session import Session, build_validate, open_session, pad_id_of
from lorakeet.api.stages import open_sinks, stage
from lorakeet.api.widths import settle_widths
from lorakeet.base.errors import InterruptedRun, LorakeetError, MachineError, RequestError
from lorakeet.base.events import Emit
from lorakeet.base.recipe import Recipe
from lorakeet.base.recipe_file import recipe_to_dict, to_yaml
from lorakeet.base.run_folder import (
    RunFolder,
    remove_leftovers,
    sha256_folder,
    to_disk_error,
    write_text,
)
from lorakeet.base.run_lock import hold_run


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run left behind.

    Args:
        adapter: the adapter's folder (after full training the model's folder).
        metrics: the best validation's values.
        stopped_because: why training ended, a sentence.
    """

    adapter: Path
    metrics: dict[str, float]
    folder: Path
    steps: int
    stopped_because: str


def train(
    recipe: RecipeLike,
    run: str | Path,
    *,
    overrides: Sequence[str] = (),
    emit: Emit | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains what a recipe asks for and leaves everything in a run folder.

    Args:
        recipe: a path, a mapping or a recipe.
        run: the folder to write; it must not hold another run.
        emit: hears every event besides ``events.jsonl`` and TensorBoard.
        stop_requested: asked after each step; True saves the state and stops.

    Raises:
        RecipeError, DataError, MachineError: before anything is trained.
        RequestError: the folder holds another run, or another process writes there.
        InterruptedRun: ``stop_requested`` said so; ``resume`` goes on.
    """
    asked = to_recipe(recipe, overrides=overrides)
    folder = RunFolder(Path(run))
    with hold_run(folder.path):
        _refuse_other_run(folder)
        remove_leftovers(folder)  # of a start that a full disk ended
        write_text(folder.recipe, to_yaml(recipe_to_dict(asked)))
        listen = open_sinks(folder, emit)
        listen("run_started", recipe=recipe_to_dict(asked))
        with _on_record(folder, listen):
            return _train_in(folder, asked, listen, stop_requested, is_resumed=False)


def resume(
    run: str | Path,
    *,
    emit: Emit | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Trained:
    """Goes on from the newest good checkpoint of a run, as if it had never stopped.

    Raises:
        FileFormatError: the folder holds no run.
        RequestError: another process writes there.
    """
    folder = RunFolder(Path(run))
    recipe = recipe_to_resume(folder)
    with hold_run(folder.path):
        remove_leftovers(folder)
        listen = open_sinks(folder, emit)
        with _on_record(folder, listen):
            return _train_in(folder, recipe, listen, stop_requested, is_resumed=True)


@contextmanager
def _on_record(run: RunFolder, emit: Emit) -> Iterator[None]:
    """The registry hears that a run goes on, and how it ended."""
    record(run.path, emit)
    try:
        yield
    except InterruptedRun:
        raise
    except LorakeetError as error:
        with suppress(MachineError):  # such as the full disk that ended the run
            emit("run_failed", message=str(error))
        raise
    finally:
        record(run.path, emit)


def _refuse_other_run(run: RunFolder) -> None:
    """A run folder belongs to one run.

    Raises:
        RequestError: the folder already holds one.
    """
    if run.events.exists() or run.resolved.exists():
        raise RequestError(
            f"{run.path}: this folder already holds a run. 'lorakeet resume {run.path}' goes on "
            "with it; choose another --run for a new one."
        )


def _train_in(
    run: RunFolder,
    recipe: Recipe,
    emit: Emit,
    stop_requested: Callable[[], bool],
    *,
    is_resumed: bool,
) -> Trained:
    """All stages of a training run, new or resumed."""
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.load import resolve_base
    from lorakeet.models.methods import check_method
    from lorakeet.models.remote_code import find_remote_code, is_remote_code_trusted
    from lorakeet.models.templates import read_recipe_tokenizer

    base_folder = resolve_base(recipe.base)
    check_method(recipe)
    if is_remote_code_trusted() and (code := find_remote_code(base_folder)):
        emit("remote_code", base=recipe.base, files=code)
    with stage(emit, "data"):
        tokenizer = read_recipe_tokenizer(recipe)
        data = prepare_data(recipe, tokenizer, run.data, emit)
    recipe = settle_widths(recipe, base_folder, data, run.widths, emit)
    recipe = settle_micro_batch(recipe, base_folder, data)
    if not (is_resumed and run.resolved.is_file()):
        kept = describe_frozen_cache(recipe, base_folder, run.path, data)
        write_resolved(
            run, recipe, base_folder=base_folder, data=data.report.get("fingerprint", {}),
            decided={"frozen_cache": kept},
        )  # fmt: skip
    elif told := describe_other_data(run, data.report.get("fingerprint", {})):
        emit("alarm", code="other-data", step=0, message=told)
    check_parent(recipe, tuple(data.label_names))
    with stage(emit, "plan"):
        make_run_plan(recipe, base_folder, run, emit, data, is_new=not is_resumed)
    with stage(emit, "load"):
        session = open_session(recipe, run, base_folder, data, emit)
    with stage(emit, "train"):
        return _train_session(session, stop_requested, is_resumed=is_resumed)


def _train_session(
    session: Session, stop_requested: Callable[[], bool], *, is_resumed: bool
) -> Trained:
    """Runs the loop, writes what was trained and reads it back."""
    from lorakeet.train.fit import train_model
    from lorakeet.train.loop import TrainJob
    from lorakeet.train.memory import peak_bytes

    run, recipe = session.run, session.recipe
    job = TrainJob(
        model=session.model, recipe=recipe, data=session.data, run=run,
        pad_id=pad_id_of(session.tokenizer),
        resume_from=run.checkpoints if is_resumed else None,
    )  # fmt: skip
    result = train_model(
        job,
        emit=session.emit,
        validate=build_validate(session),
        stop_requested=stop_requested,
    )
    if result.interrupted:
        session.emit("run_interrupted", step=result.steps)
        raise InterruptedRun(
            f"{run.path}: stopped after step {result.steps}; the state is saved. "
            f"'lorakeet resume {run.path}' goes on from there."
        )
    trained = _write_result(session)
    session.emit(
        "run_finished", steps=result.steps, values=result.best_values,
        best_step=result.best_step, stopped_because=result.stopped_because,
        tokens_per_s=result.tokens_per_s, duration_s=result.duration_s, peak_bytes=peak_bytes(),
    )  # fmt: skip
    _write_pages(run)
    return Trained(
        adapter=trained, metrics=dict(result.best_values), folder=run.path,
        steps=result.steps, stopped_because=result.stopped_because,
    )  # fmt: skip


def _write_result(session: Session) -> Path:
    """The adapter (or the full model) with its lineage and the tokenizer beside it."""
    from lorakeet.models.base_hash import hash_base
    from lorakeet.models.methods import write_trained
    from lorakeet.models.trained_form import to_lineage

    recipe, run = session.recipe, session.run
    folder = run.adapter if recipe.method.kind == "lora" else run.model
    hashes = read_resolved(run)["hashes"]
    lineage = {
        "base_sha256": sha256_folder(session.base_folder),
        "base_weights_sha256": hash_base(session.base_folder),
        "data": hashes["data"],
        "labels": list(session.data.label_names),
        **to_lineage(recipe.quantization, recipe.method),
        **({"parents": hashes["parents"]} if "parents" in hashes else {}),
    }
    write_trained(session.model, recipe.method, folder, recipe.base, lineage)
    try:
        session.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise to_disk_error(error, folder, 0) from error
    return folder


def _write_pages(run: RunFolder) -> None:
    """The report, and the curves as a picture where matplotlib is installed."""
    from lorakeet.base.events import read_events
    from lorakeet.evaluate.plots import has_matplotlib, write_curves_picture
    from lorakeet.evaluate.report import write_report

    write_report(run)
    if has_matplotlib():
        write_curves_picture(run.pictures / "curves.png", read_events(run.events))
