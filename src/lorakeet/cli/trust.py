"""``--trust-remote-code``: the one way to let a base run code of its own, for one command."""

from __future__ import annotations

from typing import Annotated

import typer


def _trust(context: typer.Context, is_trusted: bool) -> bool:
    """Holds until the command ends."""
    if is_trusted:
        from lorakeet.models.remote_code import trust_remote_code

        context.with_resource(trust_remote_code())
    return is_trusted


Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        callback=_trust,
        help="Run the code that the base brings; read it first.",
    ),
]
