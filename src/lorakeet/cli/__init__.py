"""The command line: every verb with a readable table for people and ``--json`` for machines.

Importing this package costs milliseconds; torch and transformers are imported
inside the command that needs them.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and ends the process with the exit code of its class.

    0 done, 2 the request was wrong, 3 the data or a file was wrong, 4 the machine
    could not, 130 interrupted and saved.
    """
    from lorakeet.cli.app import run

    sys.exit(run())
