"""``python -m lorakeet.cli`` is ``lorakeet``."""

from lorakeet.cli import main

main()
