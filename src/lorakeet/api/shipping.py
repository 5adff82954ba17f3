"""Ship: one merged model that is verified from disk, or a server with many adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakeet.api.resolve import recipe_of_run
from lorakeet.api.runs import record
from lorakeet.base.errors import RequestError
from lorakeet.base.events import EventLog
from lorakeet.base.run_folder import RunFolder

if TYPE_CHECKING:
    from lorakeet.serve.engine import EngineLimits


def export_merged(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    proof: str = "answers",
    into: str | None = None,
    other_base: bool = False,
) -> Any:
    """Merges a run's adapter into its base and proves the result from disk.

    Args:
        out: a new folder for the merged model.
        dtype: of the written weights; None keeps the base's.
        proof: ``answers`` loads the model to compare what it says; ``tensors`` holds one
            tensor at a time and compares the written tensors only.
        into: of a base that was trained in few bits: ``full`` takes its own weights and tells
            the drift, ``dequantised`` the rounded ones that training saw; None is ``full``, or
            ``dequantised`` where the adapter began on the rounding error (LoftQ).
        other_base: takes a base with other weights than the adapter was trained on.

    Returns:
        ``export.proof.MergeProof``.

    Raises:
        MismatchError: the reloaded model answers differently; ``out`` is not kept.
    """
    from lorakeet.export.merged import MergeOrder, write_merged
    from lorakeet.models.trained_form import starts_on_error

    folder = RunFolder(Path(run))
    recipe = recipe_of_run(folder)
    if recipe.method.kind != "lora":
        raise RequestError(
            f"{run}: full fine-tuning leaves a whole model in {folder.model}; there is nothing "
            "to merge."
        )
    if into is None:
        into = "dequantised" if starts_on_error(folder.adapter) else "full"
    order = MergeOrder(
        base=recipe.base, adapter_folder=folder.adapter, dtype=dtype, proof=proof,
        trained_on=recipe.quantization, into=into, other_base=other_base,
    )  # fmt: skip
    proof = write_merged(order, Path(out), run_proofs=folder.proofs)
    is_inside = Path(out).absolute().is_relative_to(folder.path.absolute())
    record(folder.path if is_inside else Path(out), EventLog(folder.events).emit, owner=folder.path)
    return proof


def serve(
    base: str,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    adapter_root: str | Path | None = None,
    limits: EngineLimits | None = None,
) -> None:
    """Serves a base with its adapters over an OpenAI-compatible API until stopped.

    Args:
        adapters: name in the ``model`` field of a request -> adapter folder.
        adapter_root: adapters below this folder may be loaded over HTTP; None for none.
        limits: ``serve.engine.EngineLimits``: what a request may use, the bits of the base (as
            the adapters were trained if None), and whether another base is taken.

    Raises:
        MachineError: the port is in use.
    """
    from lorakeet.serve.engine import EngineLimits
    from lorakeet.serve.http import run_server

    folders = {name: Path(path) for name, path in (adapters or {}).items()}
    run_server(
        base, folders, host=host, port=port,
        adapter_root=Path(adapter_root) if adapter_root else None,
        limits=limits or EngineLimits(),
    )  # fmt: skip
