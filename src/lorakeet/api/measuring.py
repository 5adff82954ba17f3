"""A plan that is measured: real steps of a recipe in a process of their own.

A process of its own has its own peak of memory, leaves the caller's random numbers and
state as they are, and may die of a lack of memory without taking the caller along.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakeet.base.errors import LorakeetError, MachineError
from lorakeet.base.events import ignore_events
from lorakeet.base.recipe import Recipe
from lorakeet.base.recipe_file import read_recipe, recipe_to_dict, to_yaml
from lorakeet.base.run_folder import read_json, write_json, write_text
from lorakeet.base.units import to_readable_bytes

if TYPE_CHECKING:
    from lorakeet.plan.choose import Plan

FAR_FRACTION = 1.5  # of the free memory; a prediction above it is refused untried
SMALL_FRACTION = 0.1  # of the free memory; less may be wrong ten times over and still fit
RATE_S = 5.0  # for ``plan --measure``, whose rate tells the time of the run
RECIPE, RESULT = "trial-recipe.yaml", "trial.json"
_SHOWN_CHARS = 1500


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measured figures beside the predicted ones.

    Args:
        peak_bytes: of the whole process, or of the GPU; None where the system does not tell.
        memory_correction: measured over predicted peak.
        micro_batch_tokens: what fitted.
        longest_tokens: of the largest micro-batch.
        tokens_per_s: of real steps.
        run_s: of all epochs at this rate, without validation.
        cost: of the run, where a price is given.
    """

    predicted_bytes: int
    peak_bytes: int | None
    memory_correction: float | None
    predicted_tokens_per_s: float | None
    tokens_per_s: float
    run_s: float
    cost: float | None
    micro_batch_tokens: int
    longest_tokens: int
    num_steps: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrialChoice:
    """Whether a run makes trial steps first, and why in words."""

    is_made: bool
    why: str


def choose_trial(recipe: Recipe, made: Plan, *, is_new: bool) -> TrialChoice:
    """A trial, unless what is predicted is far too much, or so little that no error matters.

    A trial costs a second load of the base and two steps.  What the libraries take is known,
    so it is set aside: model and steps are compared with what is left for them.

    Args:
        is_new: whether no step of the run has been made.
    """
    from lorakeet.plan.families import FAMILIES
    from lorakeet.plan.memory import kind_of

    memory = next(m.memory for m in made.methods if m.kind == kind_of(recipe))
    free, kind = made.hardware.usable_bytes, made.facts.model_type
    share = (memory.total - memory.process) / max(1, free - memory.process)
    told = f"model and steps are predicted to take {100 * share:.0f} % of the memory that is free"
    if not is_new:
        return TrialChoice(is_made=False, why="the run has made steps already")
    if not recipe.plan.measure_first:
        return TrialChoice(is_made=False, why="plan.measure_first is false")
    if memory.total > FAR_FRACTION * free:
        why = f"{to_readable_bytes(memory.total)} predicted is far above {to_readable_bytes(free)}"
        return TrialChoice(is_made=False, why=why)
    if kind not in FAMILIES:
        return TrialChoice(is_made=True, why=f"model_type {kind} is not known to the planner")
    if share < SMALL_FRACTION:
        return TrialChoice(is_made=False, why=f"{told}, so ten times as much would fit")
    return TrialChoice(is_made=True, why=told)


def measure_recipe(
    recipe: Recipe, folder: Path, predicted: Mapping[str, Any], *,
    num_run_tokens: int, price_per_hour: float | None = None, rate_s: float = RATE_S,
) -> Measured:  # fmt: skip
    """Real steps of a recipe, made by a child process.

    Args:
        folder: has the prepared data, and gets two small files that are removed again.
        predicted: the method's row of the plan.
        num_run_tokens: of all epochs.
        rate_s: steps of the run are timed until this has passed; 0 times one of the longest.

    Raises:
        MachineError: the steps do not fit, or the process was ended by the system.
    """
    found = run_trial(recipe, folder, rate_s=rate_s)
    peak, total = found["peak_bytes"], predicted["bytes"]["total"]
    run_s = num_run_tokens / found["tokens_per_s"]
    return Measured(
        predicted_bytes=total, peak_bytes=peak,
        memory_correction=peak / total if peak else None,
        predicted_tokens_per_s=predicted["tokens_per_s"],
        run_s=run_s, cost=run_s / 3600 * price_per_hour if price_per_hour is not None else None,
        **{name: found[name] for name in ("tokens_per_s", "micro_batch_tokens", "longest_tokens",
                                          "num_steps")},
    )  # fmt: skip


def run_trial(recipe: Recipe, folder: Path, *, rate_s: float = RATE_S) -> dict[str, Any]:
    """Starts the child, waits for it and reads what it found.

    Raises:
        MachineError: it could not make the steps.
    """
    from lorakeet.models.remote_code import FLAG, is_remote_code_trusted

    trusted = [FLAG] if is_remote_code_trusted() else []
    asked, result = folder / RECIPE, folder / RESULT
    write_text(asked, to_yaml(recipe_to_dict(recipe)))
    result.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lorakeet.api.measuring", str(folder), str(rate_s), *trusted],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = read_json(result) if result.is_file() else {}
    finally:
        asked.unlink(missing_ok=True)
        result.unlink(missing_ok=True)
    if "peak_bytes" in found:
        return found
    raise MachineError(_explain(found, done))


def _explain(found: Mapping[str, Any], done: subprocess.CompletedProcess[str]) -> str:
    """Why the steps could not be made, and what helps."""
    if "error" in found:
        return f"the trial steps failed. {found['error']}"
    if done.returncode < 0:
        return (
            f"the trial steps were ended by the system (signal {-done.returncode}), most often "
            "for a lack of memory. Lower train.micro_batch_tokens, data.max_tokens or "
            "method.rank, or choose a smaller base."
        )
    told = done.stderr.strip()[-_SHOWN_CHARS:]
    return f"the trial steps ended with code {done.returncode}: {told}"


def main(folder: Path, rate_s: float, *, is_trusted: bool) -> None:
    """The child: data, model and steps as ``train`` has them.

    Args:
        is_trusted: whether the user lets the base run code of its own.
    """
    from lorakeet.api.session import open_session, pad_id_of
    from lorakeet.base.run_folder import RunFolder
    from lorakeet.data.prepare import prepare_data
    from lorakeet.models.load import resolve_base
    from lorakeet.models.remote_code import trust_remote_code
    from lorakeet.models.templates import read_recipe_tokenizer
    from lorakeet.train.trial import try_steps

    _offer_to_the_system()
    recipe, emit = read_recipe(folder / RECIPE), ignore_events
    try:
        with trust_remote_code(is_trusted):
            data = prepare_data(recipe, read_recipe_tokenizer(recipe), folder, emit)
            session = open_session(
                recipe, RunFolder(folder), resolve_base(recipe.base), data, emit
            )  # fmt: skip
            pad_id = pad_id_of(session.tokenizer)
            trial = try_steps(session.model, recipe, data, pad_id=pad_id, emit=emit, rate_s=rate_s)
        write_json(folder / RESULT, asdict(trial))
    except LorakeetError as error:
        write_json(folder / RESULT, {"error": str(error)})


def _offer_to_the_system() -> None:
    """Lets Linux end this process, and no other, when memory runs out."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), is_trusted=len(sys.argv) > 3)
