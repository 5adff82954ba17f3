"""Base models and tokenizers, from a folder, the Hub, ModelScope, or what ships with Lorakeet.

This is the only file that names transformers' model classes.  Weights come from
safetensors alone: a pickle can run code when it is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakeet.base.errors import FileFormatError, RequestError
from lorakeet.base.quantization_settings import QuantizationSettings, to_quantization
from lorakeet.base.run_folder import read_json
from lorakeet.models.fetch import fetch_from_hub, fetch_from_modelscope, first_line
from lorakeet.models.quiet import no_bars
from lorakeet.models.remote_code import is_remote_code_trusted, refuse_remote_code
from lorakeet.models.stored_form import is_prequantized

EMBEDDED_STARTER = Path(__file__).resolve().parents[1] / "embedded" / "starter"
STARTER = "starter"
MODELSCOPE = "ms://"
_NEW_HEADS = frozenset("classifier score pre_classifier pooler classification_head summary".split())


def resolve_base(base: str) -> Path:
    """The folder of a base model, fetched when it is not on this machine.

    Args:
        base: ``starter``, a folder, ``owner/name`` on the Hub, or ``ms://owner/name``.

    Raises:
        RequestError: there is no such folder or name.
        MachineError: the hub cannot be reached or its client is not installed.
        FileFormatError: the folder holds no model.
    """
    if base == STARTER:
        return _checked(EMBEDDED_STARTER)
    folder = Path(base).expanduser()
    if folder.is_dir():
        return _checked(folder)
    if base.startswith(MODELSCOPE):
        return _checked(fetch_from_modelscope(base.removeprefix(MODELSCOPE)))
    looks_like_path = base.startswith((".", "/", "~")) or base.count("/") != 1
    if looks_like_path:
        raise RequestError(
            f"base '{base}': there is no such folder. Needed is a folder with config.json, a Hub "
            "id such as HuggingFaceTB/SmolLM2-135M-Instruct, ms://owner/name, or starter."
        )
    return _checked(fetch_from_hub(base))


def read_tokenizer(base: str) -> Any:
    """The fast tokenizer of a base model, as it lies beside the weights.

    Raises:
        FileFormatError: the folder has no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    folder = resolve_base(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=is_remote_code_trusted(), clean_up_tokenization_spaces=False
        )
    except (OSError, ValueError, KeyError) as error:
        refuse_remote_code(folder, error)
        raise FileFormatError(
            f"{folder}: no readable tokenizer ({first_line(error)}). Needed is a tokenizer.json."
        ) from error
    # The window is ours to watch; transformers' warning about it would only repeat that.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if not getattr(tokenizer, "is_fast", False):
        raise FileFormatError(
            f"{folder}: only a slow tokenizer is there, which gives no character offsets. Needed "
            "is a tokenizer.json; transformers can convert most."
        )
    return tokenizer


def load_model(
    base: str,
    *,
    task: str = "chat",
    label_names: Sequence[str] = (),
    dtype: str = "auto",
    quantization: QuantizationSettings | str | None = None,
    as_stored: bool = False,
) -> tuple[Any, Any]:
    """A base model in evaluation mode with its tokenizer, on the best device here.

    Args:
        task: ``chat`` and ``text`` load a decoder with its output head, ``classify`` an
            encoder or decoder with a classification head of ``len(label_names)`` rows.
        dtype: ``auto`` is float32 on a CPU (bfloat16 checkpoints widen without loss) and
            bfloat16 on a GPU that computes with it; older ones take float32.
        quantization: holds linear layers in 4 or 8 bits (``models.quantized``), by settings or
            a kind; a base that is quantised already needs none.
        as_stored: on a CPU, frozen layers may stay in 16 bits for ``models.narrow``, which must
            follow.

    Returns:
        (model, tokenizer).

    Raises:
        FileFormatError: no safetensors, missing weights, or an unknown architecture.
        RequestError, ShapeError, NumericsError: the weights cannot be quantised as asked.
        MachineError: the disk has no room for the cache of the quantised base.
    """
    import torch

    from lorakeet.models.quantized_cache import load_quantized

    folder = resolve_base(base)
    tokenizer = read_tokenizer(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = _choose_dtype(device) if dtype == "auto" else dtype
    settings = to_quantization(quantization) or QuantizationSettings()
    if settings.is_on or is_prequantized(folder):
        model = build_without_weights(base, task=task, label_names=label_names, dtype=name)
        load_quantized(model, folder, settings, dtype=getattr(torch, name))
    else:
        keeps = as_stored and name == "float32" and not is_remote_code_trusted()
        model = _load_as_stored(base, task, label_names) if keeps else None
        if model is None:
            model = _load_class(folder, task, label_names, getattr(torch, name))
    if model.config.pad_token_id is None and tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def _load_as_stored(base: str, task: str, label_names: Sequence[str]) -> Any | None:
    """The model read tensor by tensor (``models.stored``); None where that is not possible."""
    from lorakeet.models.stored import fill_as_stored

    model = build_without_weights(base, task=task, label_names=label_names, dtype="float32")
    return model if fill_as_stored(model, resolve_base(base)) else None


def _choose_dtype(device: str) -> str:
    """The dtype of a base: float16 would overflow, so a GPU before Ampere takes float32."""
    import torch

    has_bfloat16 = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    return "bfloat16" if has_bfloat16 else "float32"


def build_without_weights(
    base: str, *, task: str = "chat", label_names: Sequence[str] = (), dtype: str | None = None
) -> Any:
    """A base's modules with their names and sizes from config.json, on torch's meta device.

    Args:
        label_names: classes of a classifier; none keeps the configuration's.
        dtype: of the parameters; None takes the configuration's.

    Raises:
        FileFormatError: an unknown architecture.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        GenerationConfig,
    )

    folder = resolve_base(base)
    is_classifier = task == "classify"
    labels = _label_settings(label_names) if is_classifier and label_names else {}
    model_class: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=is_remote_code_trusted(), **labels
        )
        given = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        with torch.device("meta"):
            model = model_class.from_config(
                config, trust_remote_code=is_remote_code_trusted(), **given
            )
        if (folder / "generation_config.json").is_file() and not is_classifier:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model
    except (OSError, ValueError, KeyError) as error:
        refuse_remote_code(folder, error)
        raise FileFormatError(
            f"{folder}: no model can be built for task {task} ({first_line(error)}). Needed is "
            "config.json of an architecture that transformers knows."
        ) from error


def _label_settings(label_names: Sequence[str]) -> dict[str, Any]:
    """A classifier's classes, as transformers' configuration names them."""
    return {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: number for number, label in enumerate(label_names)},
    }


def _load_class(folder: Path, task: str, label_names: Sequence[str], dtype: Any) -> Any:
    """The model of a task with strict weights: only a new classification head may be missing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    settings: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": is_remote_code_trusted(),
        "output_loading_info": True,
    }
    model_class: Any = AutoModelForCausalLM
    if task == "classify":
        model_class = AutoModelForSequenceClassification
        settings |= _label_settings(label_names)
        settings["ignore_mismatched_sizes"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a new classification head is the same in two loads
        model, info = _read_weights(model_class, folder, settings)
    _refuse_incomplete(folder, info, is_classifier=task == "classify")
    return model


def _read_weights(model_class: Any, folder: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' loader, with its errors in our words.

    Raises:
        FileFormatError: a file is damaged, does not fit its configuration, or is unknown.
    """
    from safetensors import SafetensorError

    try:
        with no_bars():
            return model_class.from_pretrained(folder, **settings)
    except SafetensorError as error:
        raise FileFormatError(
            f"{folder}: a safetensors file is damaged ({first_line(error)}). Fetch or copy the "
            "model again."
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise FileFormatError(
            f"{folder}: weights have other shapes than config.json says. The two files belong to "
            "different models; fetch the model again."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        refuse_remote_code(folder, error)
        raise FileFormatError(
            f"{folder}: the model cannot be loaded ({first_line(error)}). Needed are config.json "
            "of an architecture that transformers knows, and all weights as safetensors."
        ) from error


def _refuse_incomplete(folder: Path, info: Any, *, is_classifier: bool) -> None:
    """Only a classifier's new head may be missing, or be there with another number of classes.

    Raises:
        FileFormatError: other weights are missing or have other shapes.
    """
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    lost = [
        key
        for key in sorted({*info["missing_keys"], *mismatched})
        if not (is_classifier and any(head in key.split(".") for head in _NEW_HEADS))
    ]
    if lost:
        raise FileFormatError(
            f"{folder}: {len(lost)} weights are missing or have another shape than config.json "
            f"says, such as {', '.join(lost[:3])}. The files are incomplete or of another "
            "architecture; fetch the model again."
        )


def _checked(folder: Path) -> Path:
    """A folder that holds a configuration and safe weights in a form that is read here.

    Raises:
        FileFormatError: it does not.
    """
    if not (folder / "config.json").is_file():
        raise FileFormatError(
            f"{folder}: there is no config.json, so this is no model folder. An adapter folder is "
            "given as --adapter, not as base."
        )
    if not isinstance(read_json(folder / "config.json"), dict):
        raise FileFormatError(
            f"{folder}/config.json: this is no JSON object. Needed is transformers' configuration; "
            "fetch the model again."
        )
    has_safe = any(folder.glob("*.safetensors"))
    if not has_safe and any(folder.glob("*.bin")):
        raise FileFormatError(
            f"{folder}: the weights are a pickle (.bin), which can run code when it is opened. "
            "Needed are safetensors; most Hub models offer both."
        )
    is_prequantized(folder)  # refuses what another method has quantised, before any work
    return folder
