"""After a run: ``lorakeet merge``, ``serve`` and ``chat``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakeet.base.errors import RequestError
from lorakeet.cli.output import CONSOLE, print_done, print_json
from lorakeet.cli.trust import Trust

Base = Annotated[str, typer.Option(help="A folder, a Hub id, ms://owner/name, or starter.")]
Bits = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        help="nf4, fp4, int8, int8-activations or none; as the adapters were trained if absent.",
    ),
]
OtherBase = Annotated[
    bool,
    typer.Option("--other-base", help="Take a base with other bytes than training's all the same."),
]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="NAME=FOLDER, repeatable.")]


def merge(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    out: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    proof: Annotated[
        str, typer.Option(help="answers, or tensors for models larger than memory.")
    ] = "answers",
    into: Annotated[
        str | None,
        typer.Option(help="full, or dequantised: the rounded weights that training saw."),
    ] = None,
    other_base: OtherBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
    trust: Trust = False,
) -> None:
    """Merge a run's adapter into its base and verify the result from disk."""
    from dataclasses import asdict

    from lorakeet.api.shipping import export_merged

    found = export_merged(run, out, dtype=dtype, proof=proof, into=into, other_base=other_base)
    if as_json:
        print_json(asdict(found))
        return
    for name, figure in found.figures.items():
        CONSOLE.print(f"  {name}: {figure}")
    if found.figures.get("head_untied"):
        CONSOLE.print(
            "  note: the base keeps embedding and head in one weight; the adapter changes one of "
            "the two, so the merged model has both (tie_word_embeddings: false)"
        )
    holds = "answers like base + adapter, reloaded from disk in a fresh process"
    print_done(f"{out} {holds if proof == 'answers' else 'holds the merged tensors, bit for bit'}")


def serve(
    base: Base,
    adapter: Adapters = None,
    host: Annotated[str, typer.Option(help="127.0.0.1 is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
    adapter_root: Annotated[
        Path | None, typer.Option(help="Adapters below it may be loaded over HTTP.")
    ] = None,
    quantization: Bits = None,
    other_base: OtherBase = False,
    trust: Trust = False,
) -> None:
    """Serve one base with many adapters over an OpenAI-compatible API."""
    from lorakeet.api.shipping import serve as start
    from lorakeet.base.quantization_settings import to_quantization
    from lorakeet.serve.engine import EngineLimits

    folders = _to_folders(adapter)
    names = ", ".join(folders) or "no adapter"
    CONSOLE.print(f"serving {base} with {names} on http://{host}:{port}/v1 (Ctrl-C stops)")
    start(
        base, adapters=folders, host=host, port=port, adapter_root=adapter_root,
        limits=EngineLimits(quantization=to_quantization(quantization), other_base=other_base),
    )  # fmt: skip


def chat(
    base: Base = "starter",
    adapter: Adapters = None,
    quantization: Bits = None,
    other_base: OtherBase = False,
    trust: Trust = False,
) -> None:
    """Talk to a base and its adapters in the terminal."""
    from lorakeet.base.quantization_settings import to_quantization
    from lorakeet.serve.engine import EngineLimits
    from lorakeet.serve.terminal import run_chat

    folders = {name: Path(path) for name, path in _to_folders(adapter).items()}
    form = to_quantization(quantization)
    run_chat(base, folders, limits=EngineLimits(quantization=form, other_base=other_base))


def _to_folders(adapters: list[str] | None) -> dict[str, str]:
    """``NAME=FOLDER`` pairs; all malformed ones are told at once."""
    pairs = [item.partition("=") for item in adapters or []]
    wrong = [name + equals + folder for name, equals, folder in pairs if not (name and folder)]
    if wrong:
        raise RequestError(
            f"--adapter {', '.join(wrong)}: needed NAME=FOLDER, such as law=runs/law/adapter."
        )
    names = [name for name, _, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"--adapter names {', '.join(twice)} more than once; names are unique.")
    return {name: folder for name, _, folder in pairs}
