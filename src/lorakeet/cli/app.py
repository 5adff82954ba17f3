"""The tree of commands, and the outermost edge where errors become exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lorakeet import __version__
from lorakeet.base.errors import InterruptedRun, LorakeetError
from lorakeet.cli import (
    adapter_commands,
    data_commands,
    plan_commands,
    registry_commands,
    run_commands,
    ship_commands,
    verify_commands,
)

APP = typer.Typer(
    name="lorakeet",
    help="Fine-tune a specialist model from your documents, and prove that it works.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

APP.command("quickstart")(run_commands.quickstart)
APP.command("run")(run_commands.run_all)
APP.command("new")(plan_commands.new)
APP.command("doctor")(plan_commands.doctor)
APP.command("plan")(plan_commands.plan)
APP.add_typer(data_commands.APP, name="data", help="Read, clean, lint and look at training data.")
APP.command("train")(run_commands.train)
APP.command("resume")(run_commands.resume)
APP.command("rerun")(verify_commands.rerun)
APP.command("eval")(run_commands.evaluate)
APP.command("report")(run_commands.report)
APP.add_typer(verify_commands.APP, name="verify", help="Prove what a run promises, with figures.")
APP.add_typer(
    adapter_commands.APP, name="adapters", help="List, show, compare and combine adapters."
)
APP.add_typer(registry_commands.APP, name="runs", help="List, show, compare and remove runs.")
APP.command("merge")(ship_commands.merge)
APP.command("serve")(ship_commands.serve)
APP.command("chat")(ship_commands.chat)


def _print_version(is_asked: bool) -> None:
    """Prints the version and ends."""
    if is_asked:
        print(f"lorakeet {__version__}")
        raise typer.Exit


@APP.callback()
def top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Fine-tune a specialist model from your documents, and prove that it works."""


def run() -> int:
    """The exit code of the command in ``sys.argv``; expected errors become one message."""
    from lorakeet.cli.output import ERRORS, print_error

    try:
        APP()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except InterruptedRun as stop:
        ERRORS.print(str(stop), style="bold", soft_wrap=True, markup=False)
        return stop.exit_code
    except LorakeetError as error:
        print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        ERRORS.print("stopped.")
        return 130
    except MemoryError:
        print_error("the memory is used up. Choose a smaller base, rank or window.")
        return 4
    except BrokenPipeError:
        sys.stderr.close()
    return 0
