"""The one tree of errors that Lorakeet raises on purpose.

    LorakeetError                      exit code
    ├── RequestError                   2    the request was wrong
    │   ├── RecipeError                     every mistake of a recipe, at once
    │   └── ShapeError                      sizes that do not fit together
    ├── DataError                      3    the data or a file was wrong
    │   ├── RowError                        one row of a data file
    │   ├── FileFormatError                 an adapter, checkpoint or model file
    │   ├── NumericsError                   NaN or infinity where a number was needed
    │   │   └── BadBatchError                   a batch that must not be learned from
    │   └── MismatchError                   a proof that failed: two results differ
    ├── MachineError                   4    the machine could not: memory, disk, port
    └── InterruptedRun                 130  stopped by the user, state saved

A message has three parts, in this order: what was found (with number, file and
line), what was needed, what to do next.  Anything else that reaches the user is
a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class LorakeetError(Exception):
    """An expected failure with a message for the user and an exit code for the shell."""

    exit_code = 1


class RequestError(LorakeetError):
    """A command, argument or setting asks for something that cannot be."""

    exit_code = 2


class RecipeError(RequestError):
    """All mistakes of one recipe together, one line each.

    Args:
        problems: at least one finished sentence, in the order of the file.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class ShapeError(RequestError):
    """Two sizes that must agree do not."""


class DataError(LorakeetError):
    """A file or its content is unusable."""

    exit_code = 3


class RowError(DataError):
    """One row cannot become a sample; the caller records it and goes on.

    Args:
        reason: a finished sentence without file and line, which the caller knows.
        code: a short stable word for grouping, such as ``empty-answer``.
    """

    def __init__(self, reason: str, *, code: str) -> None:
        self.reason = reason
        self.code = code
        super().__init__(reason)


class FileFormatError(DataError):
    """A model, adapter or checkpoint file is damaged, incomplete or of another kind."""


class NumericsError(DataError):
    """A tensor holds NaN or infinity where a finite number was needed."""


class BadBatchError(NumericsError):
    """A step that was not made, as its loss, gradient or weights are no numbers to go on with.

    Args:
        rows: where the batch's rows came from.
        is_in_weights: the weights themselves are not finite, so no other batch helps.
    """

    def __init__(self, message: str, *, rows: Sequence[str], is_in_weights: bool = False) -> None:
        self.rows = tuple(rows)
        self.is_in_weights = is_in_weights
        super().__init__(message)


class MismatchError(DataError):
    """A proof failed: two results that must be equal are not."""


class MachineError(LorakeetError):
    """Memory, disk, port or a missing optional package stops the work."""

    exit_code = 4


class InterruptedRun(LorakeetError):
    """The user stopped the run; its state is on disk."""

    exit_code = 130
