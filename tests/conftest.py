"""Fixtures for real data and models that lie beside the checkout and are not ours to ship."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
TALLIES = pytest.StashKey[dict[str, list[int]]]()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and models; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("real data and models (../shared) are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_llama(shared: Path) -> Path:
    """A real Llama of 260,032 parameters, trained on TinyStories; no chat template."""
    return shared / "models" / "tinyllama-stories-260k"


@pytest.fixture(scope="session")
def chat_tokenizer_folder(shared: Path) -> Path:
    """MiniMind's bilingual tokenizer of 6,400 tokens with a ChatML template."""
    return shared / "tokenizers" / "minimind"


def pytest_addoption(parser):
    """``--share 7/4`` runs the part 7 mod 4 of four parts; ``--trials FILE`` keeps the figures."""
    parser.addoption("--share", default=None, metavar="K/N", help="run one of N shares of tests")
    parser.addoption("--trials", default=None, metavar="FILE", type=Path,
                     help="write the table of trials; its other rows stay")  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Keeps the asked share, the same for the same names."""
    if config.getoption("--share"):
        number, parts = map(int, config.getoption("--share").split("/"))
        mine = [i for i in items if crc32(i.nodeid.encode()) % parts == number % parts]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine


@pytest.fixture
def tally(request) -> Callable[[str, int], Callable[[], None]]:
    """``add = tally("killed runs", 200)`` asks for 200 of a name; each ``add()`` is one of them.

    A failed trial was asked for and not added.  The figures of all tests stand in a table at
    the end, which is what ``make prove`` is run for.
    """
    tallies = request.config.stash.setdefault(TALLIES, {})

    def ask(name: str, asked: int) -> Callable[[], None]:
        row = tallies.setdefault(name, [0, 0])
        row[1] += asked

        def add() -> None:
            row[0] += 1

        return add

    return ask


def pytest_terminal_summary(terminalreporter, config):
    """The table of trials."""
    tallies = config.stash.get(TALLIES, {})
    if tallies:
        terminalreporter.section("trials")
        width = max(map(len, tallies))
        for name, (done, asked) in tallies.items():
            word = "" if done == asked else "   FAILED"
            terminalreporter.write_line(f"{name:{width}}  {done:>5} of {asked}{word}")
    if tallies and config.getoption("--trials"):
        write_trials(config.getoption("--trials"), tallies)


def write_trials(path, tallies):
    """The figures as a table; rows of other trials stay as an earlier run has written them."""
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in old if line[:1] == "|"
    ]
    rows = {name: f"{done} | {asked}" for name, done, asked in cells[2:]}
    rows |= {name: f"{done} | {asked}" for name, (done, asked) in tallies.items()}
    table = [f"| {name} | {rows[name]} |" for name in sorted(rows)]
    head = (
        "# What the trials found\n\n"
        "Written by `make prove`; each row by the last run that made its trials.\n\n"
        "| trial | passed | made |\n|---|---|---|\n"
    )
    path.write_text(head + "\n".join(table) + "\n", encoding="utf-8")
