"""``python -m lorakeet`` is ``lorakeet``."""

from lorakeet.cli import main

main()
