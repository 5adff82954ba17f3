"""Whether a base is the one that an adapter was trained on.

    SHA-256 over the names and SHA-256 of  config.json, tokenizer.json, *.safetensors

These files decide what a model answers; a README beside them does not.  The digest of a
large file is remembered with its size and time of change, so that a server's start does not
read 15 GB again.  ``lorakeet.json`` keeps the digest as ``base_weights_sha256``.

An adapter also belongs to the bits of its base when it began on their rounding error
(``models.loftq``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakeet.adapters.stored import read_lineage
from lorakeet.base.errors import DataError, LorakeetError, RequestError
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.run_folder import read_json, sha256_file, sha256_folder, write_json
from lorakeet.models.load import resolve_base
from lorakeet.models.trained_form import read_trained_form, starts_on_error

KEY, OLD_KEY = "base_weights_sha256", "base_sha256"
REMEMBERED_BYTES = 64 * 1024**2  # smaller files are hashed again in a tenth of a second
MEMORY = Path(".cache") / "lorakeet" / "hashes.json"  # below the user's home


def hash_base(folder: Path) -> str:
    """One digest over what decides a base's answers."""
    digest = hashlib.sha256()
    paths = [folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors")]
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(f"{path.name}\0{_hash_file(path)}\n".encode())
    return digest.hexdigest()


def check_adapter(adapter: Path, *, base: str | None, held: QuantizationSettings) -> None:
    """Passes an adapter that belongs to a base in these bits.

    Args:
        base: None leaves its weights unchecked, as the user takes another base knowingly.

    Raises:
        DataError, RequestError: as ``check_base`` and ``check_form``.
    """
    check_form(adapter, held)
    if base is not None:
        check_base(adapter, base)


def check_base(adapter: Path, base: str) -> None:
    """Passes an adapter that was trained on this base, or that does not say on which.

    Raises:
        DataError: the base has other weights, configuration or tokenizer.
    """
    lineage, folder = read_lineage(adapter), resolve_base(base)
    if is_other_base(lineage, folder):
        raise DataError(
            f"{adapter}: this adapter was trained on {lineage.get('base')} "
            f"(SHA-256 {str(lineage.get(KEY) or lineage.get(OLD_KEY))[:12]}), and {base} has other "
            f"weights, configuration or tokenizer ({hash_base(folder)[:12]}). Take the base that "
            "it was trained on; --other-base takes this one all the same, such as a copy in "
            "another dtype."
        )


def is_other_base(lineage: Mapping[str, Any], folder: Path) -> bool:
    """Whether a lineage names the digest of another base; False where it names none."""
    if KEY in lineage:
        return lineage[KEY] != hash_base(folder)
    return OLD_KEY in lineage and lineage[OLD_KEY] != sha256_folder(folder)


def check_form(adapter: Path, held: QuantizationSettings) -> None:
    """Passes an adapter that bears its base in these bits.

    Raises:
        RequestError: it began on the rounding error of other bits.
    """
    trained = read_trained_form([adapter])
    if starts_on_error(adapter) and held.model_copy(update={"cache": trained.cache}) != trained:
        raise RequestError(
            f"{adapter}: this adapter began on the rounding error of a base {_to_words(trained)} "
            f"(LoftQ), and the base is held {_to_words(held)}, where its repair would be an error. "
            "Hold the base as in training: the same quantization in a recipe, no --quantization "
            "and no adapters of other bits when serving, --into dequantised when merging."
        )


def _to_words(form: QuantizationSettings) -> str:
    """How a base is held, in a sentence."""
    if not form.is_on:
        return "in full"
    blocks = "" if form.kind == "int8" else f" (blocks of {form.block_size})"
    return f"in {form.kind}{blocks}"


def _hash_file(path: Path) -> str:
    """A file's SHA-256, of a large one from memory while its size and time are the same."""
    stat = path.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return sha256_file(path)
    memory, key = Path.home() / MEMORY, str(path.resolve())
    stamp = [stat.st_size, stat.st_mtime_ns]
    known: Any = {}
    with suppress(LorakeetError, OSError):
        known = read_json(memory)
    known = known if isinstance(known, dict) else {}
    past = known.get(key)
    if isinstance(past, list) and past[:2] == stamp:
        return str(past[2])
    digest = sha256_file(path)
    with suppress(LorakeetError, OSError):  # a home that cannot be written costs time only
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, {**known, key: [*stamp, digest]})
    return digest
