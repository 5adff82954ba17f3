"""Models from the Hub and from ModelScope, through their own clients."""

from __future__ import annotations

from pathlib import Path

from lorakeet.base.errors import MachineError, RequestError
from lorakeet.models.remote_code import is_remote_code_trusted

_WANTED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*", "README*")


def fetch_from_hub(name: str) -> Path:
    """A snapshot of a Hub model without pickles; ``HF_ENDPOINT`` is honoured.

    Raises:
        RequestError: the Hub knows no such name.
        MachineError: it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    code = ("*.py",) if is_remote_code_trusted() else ()
    try:
        return Path(snapshot_download(name, allow_patterns=[*_WANTED_FILES, *code]))
    except RepositoryNotFoundError as error:
        raise RequestError(
            f"base '{name}': the Hub knows no such model, or it is private. Check the spelling, "
            "or log in with 'hf auth login'."
        ) from error
    except HFValidationError as error:
        raise RequestError(
            f"base '{name}': there is no such folder, and it is no Hub id ({first_line(error)})"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise MachineError(
            f"base '{name}': no such folder here, and the Hub cannot be reached "
            f"({first_line(error)}). Check the network, or name a folder, or 'starter'."
        ) from error


def fetch_from_modelscope(name: str) -> Path:
    """A snapshot of a ModelScope model, through its own client.

    Raises:
        MachineError: the client is not installed, or gave nothing.
    """
    try:
        from modelscope_hub import snapshot_download
    except ImportError:
        try:
            from modelscope import snapshot_download
        except ImportError as error:
            raise MachineError(
                f"base 'ms://{name}': ModelScope's client is not installed. "
                "'pip install modelscope-hub' adds it."
            ) from error
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise MachineError(
            f"base 'ms://{name}': ModelScope gave no model ({first_line(error)}). Check the name "
            "and the network."
        ) from error


def first_line(error: BaseException) -> str:
    """The head of a library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
