"""What the frozen layers answered, kept on disk and taken again in later epochs.

states.bin   rows of [T, D] bytes, one sample after the other
index.bin    a record a sample: BLAKE2 of its ids, offset, bytes, CRC-32 of the bytes
key.json     what the answers depend on besides the ids: weights, configuration, versions

A sample is known by its tokens, so the order of rows, packs and epochs do not matter and equal
samples are kept once. Files are read a micro-batch at a time: memory does not grow with them.

Cost: 4 D bytes a token; 2.2 MiB for 1,000 tokens at D = 576.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lorakeet.base.events import Emit
from lorakeet.base.records import EncodedSample
from lorakeet.base.run_folder import read_json, write_json
from lorakeet.models.frozen import FrozenPart, captured, replaced

FORMAT = 1
_RECORD = struct.Struct("<16sQQI")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a sample's states lie, and their checksum."""

    start: int
    num_bytes: int
    checksum: int


class FrozenStates:
    """The kept answers of a model's frozen layers.

    Args:
        folder: made when it is not there; what another base left in it is removed, and told.
        limit_bytes: no more is kept than this; the rest is computed in every epoch.
    """

    def __init__(
        self, folder: Path, model: nn.Module, part: FrozenPart, *, limit_bytes: int, emit: Emit
    ) -> None:
        self.folder, self.part, self.emit = folder, part, emit
        self.limit_bytes = limit_bytes
        self.num_taken = 0
        self._states, self._index = folder / "states.bin", folder / "index.bin"
        self._places: dict[bytes, _Place] = {}
        self._used_bytes = 0
        self._open({"format": FORMAT, "key": hash_frozen(model, part)})

    @contextmanager
    def passing(self, samples: Sequence[EncodedSample], device: torch.device) -> Iterator[None]:
        """Inside, samples that lie end to end pass the model, with kept states where all are."""
        keys = [_key_of(sample) for sample in samples]
        known = self._read(keys, samples)
        if known is not None:
            self.num_taken += len(keys)
            with replaced(self.part, known.to(device)):
                yield
            return
        with captured(self.part) as seen:
            yield
        self._keep(keys, samples, seen[0][0])

    def remove(self) -> int:
        """Takes the files away, as after the last step nothing reads them; the bytes kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
        return self._used_bytes

    def _open(self, key: dict[str, object]) -> None:
        """Takes up what an earlier process kept, if it kept it of the same base."""
        path = self.folder / "key.json"
        if path.is_file() and self._index.is_file() and self._states.is_file():
            if read_json(path) == key:
                self._load()
                return
            self._tell("it was made with another base, so it is made anew.")
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
            write_json(path, key)
            self._states.touch()
            self._index.touch()
        except OSError as error:
            self._give_up(error)

    def _load(self) -> None:
        """The places of all whole records; a torn end is written over."""
        content, size = self._index.read_bytes(), self._states.stat().st_size
        whole = len(content) // _RECORD.size * _RECORD.size
        for key, start, num_bytes, checksum in _RECORD.iter_unpack(content[:whole]):
            if start + num_bytes <= size:
                self._places[key] = _Place(start=start, num_bytes=num_bytes, checksum=checksum)
                self._used_bytes = max(self._used_bytes, start + num_bytes)
        if whole < len(content):
            with self._index.open("r+b") as file:
                file.truncate(whole)

    def _read(self, keys: Sequence[bytes], samples: Sequence[EncodedSample]) -> Tensor | None:
        """The states [1, T, D] of all samples, or None when one is not there or damaged."""
        if not all(key in self._places for key in keys):
            return None
        parts = []
        with self._states.open("rb") as file:
            for key, sample in zip(keys, samples, strict=True):
                place = self._places[key]
                file.seek(place.start)
                found = file.read(place.num_bytes)
                is_whole = place.num_bytes == self._count_bytes(len(sample.ids))
                if not is_whole or zlib.crc32(found) != place.checksum:
                    del self._places[key]
                    self._tell("a part of it is damaged and is computed again.")
                    return None
                parts.append(found)
        states = torch.frombuffer(bytearray(b"".join(parts)), dtype=self.part.dtype)
        return states.view(1, -1, self.part.width)

    def _keep(
        self, keys: Sequence[bytes], samples: Sequence[EncodedSample], states: Tensor
    ) -> None:
        """Adds the samples that are not there yet, the states before their record."""
        pieces = states.split([len(sample.ids) for sample in samples])
        for key, piece in zip(keys, pieces, strict=True):
            content = _to_bytes(piece)
            if key in self._places or self._used_bytes + len(content) > self.limit_bytes:
                continue
            place = _Place(
                start=self._used_bytes, num_bytes=len(content), checksum=zlib.crc32(content)
            )
            try:
                with self._states.open("r+b") as file:
                    file.seek(place.start)
                    file.write(content)
                with self._index.open("ab") as file:
                    file.write(_RECORD.pack(key, place.start, place.num_bytes, place.checksum))
            except OSError as error:
                self._give_up(error)
                return
            self._places[key] = place
            self._used_bytes += len(content)

    def _count_bytes(self, num_tokens: int) -> int:
        return num_tokens * self.part.width * self.part.dtype.itemsize

    def _give_up(self, error: OSError) -> None:
        """Keeps nothing more; what is there is still taken."""
        self.limit_bytes = 0
        self._tell(f"nothing more can be kept there ({error}); the rest is computed every time.")

    def _tell(self, what: str) -> None:
        message = f"{self.folder}, the answers of frozen layers: {what} Results are the same."
        self.emit("alarm", code="frozen-cache", step=0, message=message)


def hash_frozen(model: nn.Module, part: FrozenPart) -> str:
    """SHA-256 of everything that the kept answers depend on besides the tokens."""
    found = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    found.update(f"{torch.__version__} {len(part.layers)} {part.dtype}".encode())
    for module in (model.get_input_embeddings(), *part.layers):
        for name, tensor in module.state_dict().items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(_to_bytes(tensor))
    return found.hexdigest()


def _key_of(sample: EncodedSample) -> bytes:
    ids = np.ascontiguousarray(sample.ids, dtype=np.int32)
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _to_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
