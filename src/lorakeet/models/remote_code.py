"""Code that comes with a base model: never run unless the command line says so.

A base may name Python files of its own in config.json (``auto_map``).  They are programs,
and whoever wrote the base wrote them, so ``--trust-remote-code`` is a word of the user at
the command line; no recipe, adapter or file can say it.  It holds for one command.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from lorakeet.base.errors import RequestError
from lorakeet.base.run_folder import read_json, sha256_file

FLAG = "--trust-remote-code"
_IS_TRUSTED: ContextVar[bool] = ContextVar("is_remote_code_trusted", default=False)
_CONFIGS = ("config.json", "tokenizer_config.json")


@contextmanager
def trust_remote_code(is_trusted: bool = True) -> Iterator[None]:
    """Within it, bases may bring code of their own."""
    token = _IS_TRUSTED.set(is_trusted)
    try:
        yield
    finally:
        _IS_TRUSTED.reset(token)


def is_remote_code_trusted() -> bool:
    """Whether the user has said so for this command."""
    return _IS_TRUSTED.get()


def find_remote_code(folder: Path) -> dict[str, str]:
    """Python files in a base's folder with their SHA-256; empty for one that names no code."""
    if not _named_code(folder):
        return {}
    files = sorted(folder.rglob("*.py"))
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def advise_remote_code(folder: Path) -> list[str]:
    """What a plan says of a base that names code of its own; nothing for one that does not."""
    named = ", ".join(_named_code(folder)[:3])
    return [
        f"this base names code of its own ({named}). The plan counts config.json and the weights "
        "and runs none of it. Where transformers has no such model_type, training needs the code "
        f"and runs it only with {FLAG}: read it first."
    ] if named else []  # fmt: skip


def copy_remote_code(base: Path, folder: Path) -> None:
    """Puts a trusted base's code beside a model that was made of it, which needs it too."""
    for name in find_remote_code(base) if is_remote_code_trusted() else ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, folder / name)


def refuse_remote_code(folder: Path, error: BaseException) -> None:
    """Says what transformers' refusal of a base's own code means, when it is that.

    Raises:
        RequestError: the base needs its own code and nobody has said that it may run.
    """
    if "trust_remote_code" not in str(error) or is_remote_code_trusted():
        return
    named = ", ".join(_named_code(folder)[:3])
    raise RequestError(
        f"{folder}: this base needs code of its own ({named}), which can do anything on this "
        f"machine that you can. It is not run unless you say so: read it, and if you trust who "
        f"wrote it, add {FLAG} to the command. A base that transformers knows needs no such code."
    ) from error


def _named_code(folder: Path) -> list[str]:
    """The classes that a base's configuration files name in ``auto_map``."""
    found: set[str] = set()
    for name in _CONFIGS:
        path = folder / name
        content: Any = read_json(path) if path.is_file() else {}
        named = content.get("auto_map") if isinstance(content, dict) else None
        for value in named.values() if isinstance(named, dict) else ():
            parts = value if isinstance(value, list) else [value]
            found.update(part for part in parts if isinstance(part, str))
    return sorted(found)
