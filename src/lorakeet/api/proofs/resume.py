"""``verify resume``: a run that was stopped and resumed leaves the bytes of one that was not.

    straight    2k steps
    stopped     k steps, a checkpoint, and k more from a model that was loaded anew

Both train the run's own recipe in temporary folders, with another number of steps and
without early stopping.  Compared are the adapter and the last checkpoint: weights,
the optimiser's moments and the best weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lorakeet.api.resolve import read_installed_versions, recipe_of_run
from lorakeet.api.training import resume, train
from lorakeet.base.errors import InterruptedRun, RequestError
from lorakeet.base.proofs import Proof, find_excess, write_proof
from lorakeet.base.recipe import Recipe
from lorakeet.base.recipe_file import recipe_from_dict, recipe_to_dict
from lorakeet.base.run_folder import RunFolder, sha256_file

DEFAULT_STEPS = 4
LIMITS = {"num_different_files": 0}


def verify_resume(run: str | Path, *, steps: int = DEFAULT_STEPS) -> Proof:
    """Trains twice and compares the SHA-256 of every weight file.

    Args:
        steps: k, optimiser steps before and after the stop.

    Raises:
        RequestError: ``steps`` is below 1.
        DataError: the run's data or base is gone.

    Cost: 4k optimiser steps, and the model loaded three times.
    """
    if steps < 1:
        raise RequestError(f"steps is {steps}; a resume needs at least 1 before it.")
    folder = RunFolder(Path(run))
    recipe = _shorten(recipe_of_run(folder), steps)
    with tempfile.TemporaryDirectory(prefix=".verify-resume-", dir=folder.path) as place:
        straight, cut = Path(place) / "straight", Path(place) / "stopped"
        train(recipe, straight)
        heard: list[int] = []

        def listen(kind: str, /, **fields: object) -> None:
            if kind == "step":
                heard.append(1)

        try:
            train(recipe, cut, emit=listen, stop_requested=lambda: len(heard) == steps)
        except InterruptedRun:
            resume(cut)
        else:
            raise RequestError(f"{folder.path}: no step was left after step {steps} to resume.")
        one, two = (_digest_end(RunFolder(each), 2 * steps) for each in (straight, cut))
    different = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    figures = {
        "num_different_files": len(different), "num_files": len(one), "steps_before": steps,
        "steps_after": steps, "sha256_straight": one, "sha256_resumed": two,
    }  # fmt: skip
    proof = Proof(
        name="resume",
        compared=f"the weights after {2 * steps} steps with those after {steps} steps, a stop, "
        f"and {steps} more",
        figures=figures, tolerances=LIMITS,
        problems=(*find_excess(figures, LIMITS), *(f"{name} differs." for name in different)),
        versions=read_installed_versions(),
    )  # fmt: skip
    write_proof(folder, proof)
    return proof


def sha256_weights(folder: Path) -> dict[str, str]:
    """The digest of each safetensors file of an adapter or model, by name."""
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}


def _digest_end(run: RunFolder, steps: int) -> dict[str, str]:
    """Digests of what was trained and of the state after the last step."""
    result = run.adapter if run.adapter.is_dir() else run.model
    state = run.checkpoints / f"step-{steps:06d}"
    return {
        f"{folder.name}/{name}": digest
        for folder in (result, state)
        for name, digest in sha256_weights(folder).items()
    }


def _shorten(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with 2k steps however little data there is, no look and no early stop."""
    content = recipe_to_dict(recipe)
    content["train"] |= {
        "max_steps": 2 * steps, "epochs": 2 * steps * recipe.train.batch_size,
        "checkpoint_every_steps": steps, "evaluate_every_steps": 2 * steps,
        "early_stopping": None, "sample_prompts": [],
    }  # fmt: skip
    return recipe_from_dict(content)
