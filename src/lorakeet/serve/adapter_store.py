"""Which adapters can be asked for, and which version of each a request holds.

An adapter's version is its content: the SHA-256 of its folder.  A version never
changes, so a request that holds one gets the same weights from its first token
to its last, whatever is loaded or unloaded meanwhile:

    load "law" (aaa) ──> request 1 holds aaa
    load "law" (bbb) ──> request 2 holds bbb; aaa waits for request 1, then goes

A version leaves memory when no name points to it and no request holds it.  This
file decides; it touches neither tensors nor files, and the engine attaches and
detaches as it is told.  All methods may be called from any thread.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lorakeet.base.errors import RequestError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MIN_PREFIX = 6


class UnknownModelError(RequestError):
    """A request names neither the base nor an adapter that is loaded."""


class ForbiddenPathError(RequestError):
    """A path lies outside the folder that adapters may be loaded from."""


@dataclass(frozen=True, kw_only=True)
class AdapterVersion:
    """One adapter's content; two names with equal content share it.

    Args:
        digest: SHA-256 of the folder, 64 hex digits.
        folder: where it was read from, for people; it is not read again.
    """

    digest: str
    folder: Path

    @property
    def internal_name(self) -> str:
        """The name under which its weights hang in the model."""
        return f"v{self.digest[:24]}"


class AdapterStore:
    """Names, versions and holders.

    Args:
        base_names: every name of the base model; the first is the one to show.
    """

    def __init__(self, base_names: tuple[str, ...]) -> None:
        self.base_names = base_names
        self._current: dict[str, AdapterVersion] = {}
        self._holders: Counter[str] = Counter()
        self._resident: dict[str, AdapterVersion] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Every name that can be asked for, the base first."""
        with self._lock:
            return [self.base_names[0], *sorted(self._current)]

    @property
    def adapters(self) -> dict[str, AdapterVersion]:
        """The version that each adapter's name stands for."""
        with self._lock:
            return dict(sorted(self._current.items()))

    @property
    def resident(self) -> dict[str, AdapterVersion]:
        """Versions in memory by digest, those that only wait for their last request included."""
        with self._lock:
            return dict(self._resident)

    def acquire(self, model: str) -> AdapterVersion | None:
        """The version that a request for ``model`` gets, held until ``release``.

        Args:
            model: the base's name, an adapter's, or ``adapter@`` and at least
                six digits of its version.

        Returns:
            None for the base.

        Raises:
            UnknownModelError: nothing is called that; the message lists what is.
        """
        with self._lock:
            version = self._find(model)
            if version is not None:
                self._holders[version.digest] += 1
            return version

    def look_up(self, model: str) -> AdapterVersion | None:
        """As ``acquire``, without holding anything.

        Raises:
            UnknownModelError: nothing is called that.
        """
        with self._lock:
            return self._find(model)

    def release(self, version: AdapterVersion | None) -> AdapterVersion | None:
        """Lets go of a held version.

        Returns:
            the version if nobody needs it any more and it has to leave memory.
        """
        if version is None:
            return None
        with self._lock:
            self._holders[version.digest] -= 1
            return self._evict_when_unused(version)

    def publish(self, name: str, version: AdapterVersion) -> AdapterVersion | None:
        """Points a name to a version that is in memory; requests in flight keep theirs.

        Returns:
            the version that the name had before, if it has to leave memory.

        Raises:
            RequestError: the name is the base's, or is no name.
        """
        self.check_name(name)
        with self._lock:
            before = self._current.get(name)
            self._current[name] = version
            self._resident[version.digest] = version
            return self._evict_when_unused(before) if before else None

    def retire(self, name: str) -> AdapterVersion | None:
        """Takes a name away; requests in flight keep their version.

        Returns:
            the version, if it has to leave memory.

        Raises:
            UnknownModelError: no adapter is called that.
        """
        with self._lock:
            version = self._current.pop(name, None)
            if version is None:
                known = ", ".join(sorted(self._current)) or "none"
                raise UnknownModelError(
                    f"There is no adapter '{name[:80]}' to unload. Loaded are: {known}."
                )
            return self._evict_when_unused(version)

    def check_name(self, name: str) -> None:
        """Passes a name that an adapter may carry.

        Raises:
            RequestError: it is the base's, or is more than letters, digits and ``. _ -``.
        """
        if not NAME_PATTERN.fullmatch(name):
            raise RequestError(
                f"'{name[:80]}' cannot name an adapter. A name has 1 to 64 letters, digits, dots, "
                "dashes and underscores and begins with a letter or digit."
            )
        if name in self.base_names:
            raise RequestError(f"'{name}' names the base model. Choose another adapter name.")

    def _find(self, model: str) -> AdapterVersion | None:
        if model in self.base_names:
            return None
        name, at, prefix = model.partition("@")
        version = self._current.get(name)
        if version is None or (at and not _is_prefix(prefix, version)):
            known = ", ".join([self.base_names[0], *sorted(self._current)])
            raise UnknownModelError(
                f"There is no model '{model[:80]}'. Loaded are: {known}. "
                "GET /v1/models lists them with their versions."
            )
        return version

    def _evict_when_unused(self, version: AdapterVersion) -> AdapterVersion | None:
        is_named = any(one.digest == version.digest for one in self._current.values())
        if is_named or self._holders[version.digest] > 0:
            return None
        del self._holders[version.digest]
        return self._resident.pop(version.digest, None)


def find_folder_under(root: Path | None, path: str) -> Path:
    """The folder that a request may load, with every link followed.

    Args:
        root: the only folder adapters come from; None forbids all.
        path: absolute, or relative to the root.

    Raises:
        ForbiddenPathError: no root is set, or the folder or a file in it lies outside.
        RequestError: there is no such folder.
    """
    if root is None:
        raise ForbiddenPathError(
            "This server loads no adapters over HTTP. Start it with --adapter-root FOLDER to "
            "allow those under that folder."
        )
    root = root.resolve()
    if "\0" in path:
        raise RequestError("lora_path holds a zero byte. Give the adapter's folder.")
    try:
        folder = (root / path).resolve()
        outside = not folder.is_relative_to(root)
        if not outside and not folder.is_dir():
            raise RequestError(f"There is no folder '{path[:200]}' under the adapter root.")
        outside = outside or any(not p.resolve().is_relative_to(root) for p in folder.rglob("*"))
    except (OSError, RuntimeError) as error:  # names too long for the system, loops of links
        raise RequestError(f"'{path[:80]}' is no usable path ({error}).") from error
    if outside:
        raise ForbiddenPathError(
            f"'{path[:200]}' lies outside the adapter root. Copy the adapter under it."
        )
    return folder


def _is_prefix(prefix: str, version: AdapterVersion) -> bool:
    """Whether ``@prefix`` means this version."""
    return len(prefix) >= MIN_PREFIX and version.digest.startswith(prefix)
