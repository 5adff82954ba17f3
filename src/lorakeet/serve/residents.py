"""Adapter versions in the model: attached once, detached when the store says nobody needs them.

The store decides, this file acts.  Attaching and detaching are the worker's
tasks, so between the store's decision and the act a version may have been asked
for again; the last look at the store happens on the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakeet.adapters.attach import detach, set_active
from lorakeet.adapters.files import read_adapter
from lorakeet.base.errors import MismatchError, RequestError
from lorakeet.base.run_folder import sha256_folder
from lorakeet.serve.adapter_store import AdapterStore, AdapterVersion
from lorakeet.serve.worker import Worker


class Residents:
    """Loads, switches and drops adapter versions of one model.

    Args:
        model: changed by the worker's thread only.
        check: raises for a folder whose adapter belongs to another base.
    """

    def __init__(
        self, model: Any, store: AdapterStore, worker: Worker, check: Callable[[Path], None]
    ) -> None:
        self._model = model
        self._check = check
        self._store = store
        self._worker = worker
        self._attached: set[str] = set()

    def load(self, name: str, folder: Path) -> AdapterVersion:
        """Reads an adapter and points the name to it; waits until it can be asked for.

        Raises:
            RequestError: the name is malformed or the base's, or there is no such folder.
            FileFormatError: the folder is damaged or does not fit the base.
            DataError: it was trained on another base.
            MismatchError: the folder changed while it was read.
        """
        self._store.check_name(name)
        return self._worker.run(lambda: self._attach(name, folder))

    def unload(self, name: str) -> None:
        """Takes the name away at once; the weights go when their last request has ended.

        Raises:
            UnknownModelError: no adapter is called that.
        """
        self._drop(self._store.retire(name))

    def release(self, version: AdapterVersion | None) -> None:
        """Ends one request's hold; callable from any thread."""
        self._drop(self._store.release(version))

    def switch_to(self, version: AdapterVersion | None) -> None:
        """On the worker: makes one version, or the bare base, what the model computes."""
        set_active(self._model, version.internal_name if version else None)

    def _attach(self, name: str, folder: Path) -> AdapterVersion:
        """On the worker: reads a folder unless its content is in the model already."""
        digest = _hash_adapter(folder)
        version = AdapterVersion(digest=digest, folder=folder)
        if digest not in self._attached:
            self._check(folder)
            read_adapter(self._model, folder, name=version.internal_name)
            self._attached.add(digest)
            if _hash_adapter(folder) != digest:
                self._detach(version)
                raise MismatchError(
                    f"{folder}: its files changed while they were read. Load it again when the "
                    "writer has finished."
                )
        self._drop(self._store.publish(name, version))
        return version

    def _drop(self, version: AdapterVersion | None) -> None:
        if version is not None:
            self._worker.add_chore(lambda: self._detach(version))

    def _detach(self, version: AdapterVersion) -> None:
        """On the worker: forgets a version, unless somebody asked for it meanwhile."""
        if version.digest in self._attached and version.digest not in self._store.resident:
            self._attached.discard(version.digest)
            detach(self._model, version.internal_name)


def _hash_adapter(folder: Path) -> str:
    """The version of an adapter's folder."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: there is no such folder. Give an adapter's folder.")
    return sha256_folder(folder)
