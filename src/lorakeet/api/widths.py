"""Mixed widths of a run: measured once on its own data, then a part of its recipe.

    base in full precision + training rows -> cost of each layer in each form
                                           -> widths within the budget -> widths.json, recipe

The chosen widths stand in ``resolved.yaml``, so all that follows holds the base in the same
form and measures nothing again; another run on the same base and data finds them in the cache.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lorakeet.api.stages import stage
from lorakeet.base.errors import FileFormatError, MachineError
from lorakeet.base.events import Emit
from lorakeet.base.quantization_settings import QuantizationSettings
from lorakeet.base.recipe import Recipe
from lorakeet.base.run_folder import read_json, write_json
from lorakeet.base.units import to_readable_bytes

FORMAT = 1
WORK_BYTES = 4  # of a weight: its forms and the largest gradient, generously


def settle_widths(recipe: Recipe, base_folder: Path, data: Any, out: Path, emit: Emit) -> Recipe:
    """The recipe with its widths, measured where it asks for a mix and names none.

    Args:
        data: ``data.prepare.PreparedData``; some of its training rows are scored.
        out: the file that gets each layer's width, bytes and costs.

    Raises:
        MachineError: the base in full precision does not fit into memory.
        RequestError: the budget is smaller than the smallest forms.
    """
    asked = recipe.quantization
    if asked.kind != "mixed" or asked.widths:
        return recipe
    with stage(emit, "widths"):
        place = _find_place(recipe, base_folder, data)
        content = _read_kept(place)
        if content is None:
            _refuse_large(base_folder)
            content = measure_widths(recipe, data)
            if place is not None:
                write_json(place, content)
        write_json(out, content)
    widths = {name: layer["width"] for name, layer in content["layers"].items()}
    settled = asked.model_copy(update={"widths": widths})
    return recipe.model_copy(update={"quantization": settled})


def measure_widths(recipe: Recipe, data: Any) -> dict[str, Any]:
    """Each layer's width with the costs behind it, and the loss that real passes found.

    Returns:
        plain JSON: ``layers`` (width, bytes and cost of each form), ``bits_per_weight``, and
        ``loss`` of the rows in nats a target: ``plain``, ``nf4`` (all layers) and ``mixed``.

    Raises:
        RequestError: the budget is smaller than the smallest forms.
    """
    from lorakeet.models.load import load_model
    from lorakeet.models.sensitivity import measure_sensitivity
    from lorakeet.quant.widths import choose_widths

    model, tokenizer = load_model(recipe.base, task=recipe.task, label_names=data.label_names)
    asked = recipe.quantization
    samples, score = _choose_rows(data.train, asked.calibration_rows), _score_of(recipe.task)
    forms = _list_forms(model, asked)
    layers = measure_sensitivity(model, samples, score, forms)
    options = {name: _list_options(layer, forms[name]) for name, layer in layers.items()}
    num_weights = sum(layer.weight.numel() for layer in layers.values())
    chosen = choose_widths(options, asked.bits_per_weight * num_weights / 8)
    held = {name: options[name][width] for name, width in chosen.items()}
    return {
        "bits_per_weight": 8 * sum(option.num_bytes for option in held.values()) / num_weights,
        "rows": len(samples),
        "loss": _compare(model, samples, score, layers, chosen),
        "layers": {
            name: {"width": width, "bytes": held[name].num_bytes,
                   "cost": {form: option.cost for form, option in options[name].items()}}
            for name, width in chosen.items()
        },
    }  # fmt: skip


def _list_forms(model: Any, settings: QuantizationSettings) -> dict[str, dict[str, Any]]:
    """Layer -> width -> form: 4 bits in blocks of the settings and four times as long, and 8."""
    from lorakeet.adapters.layer import sizes_of
    from lorakeet.base.quantization_settings import BLOCK_SIZES
    from lorakeet.models.quantized_choice import select_quantized, to_form

    K = settings.block_size
    widths = [f"nf4/{size}" for size in (4 * K, K) if size in BLOCK_SIZES] + ["int8"]
    every = {width: to_form(width, settings) for width in widths}
    found = {}
    for name in select_quantized(model, settings):
        num_in, num_out = sizes_of(model.get_submodule(name))
        found[name] = {
            width: form for width, form in every.items()
            if width == "int8" or num_in * num_out % form.block_size == 0
        }  # fmt: skip
    return found


def _list_options(layer: Any, forms: dict[str, Any]) -> dict[str, Any]:
    """What each form of a layer takes and costs, and the plain weight, which costs nothing."""
    from lorakeet.quant.widths import Option, count_bytes

    shape, plain = tuple(layer.weight.shape), layer.weight.element_size()
    options = {
        width: Option(num_bytes=count_bytes(shape, form, plain), cost=layer.cost[width])
        for width, form in forms.items()
    }
    return options | {"none": Option(num_bytes=count_bytes(shape, None, plain), cost=0.0)}


def _compare(
    model: Any, samples: list[Any], score: Any, layers: dict[str, Any], chosen: dict[str, str]
) -> dict[str, float]:
    """The loss by real passes: plain, every layer in its finest 4 bits, and the mix."""
    import torch

    from lorakeet.models.sensitivity import rounded

    finest = {
        name: next((w for w in reversed(layer.forms) if w.startswith("nf4")), "none")
        for name, layer in layers.items()
    }
    found = {}
    for arm, widths in (("plain", dict.fromkeys(layers, "none")), ("nf4", finest),
                        ("mixed", chosen)):  # fmt: skip
        with torch.no_grad(), rounded(model, layers, widths):
            scored = [score(model, sample) for sample in samples]
        found[arm] = float(sum(loss for loss, _ in scored)) / sum(count for _, count in scored)
    return found


def _choose_rows(reader: Any, num_rows: int) -> list[Any]:
    """Rows at equal distances, as neighbours are often alike."""
    count = min(num_rows, len(reader))
    return [reader[place * len(reader) // count] for place in range(count)]


def _score_of(task: str) -> Any:
    """The summed loss of one sample and its targets."""
    import torch

    from lorakeet.data.collate import collate
    from lorakeet.models.score import score_labels, score_targets

    def score(model: Any, sample: Any) -> tuple[Any, int]:
        batch = collate([sample], pad_id=0)  # a row alone is not padded
        ids, attention, mask, labels = (
            torch.from_numpy(array).to(model.device)
            for array in (batch.ids_BT, batch.attention_BT, batch.mask_BT, batch.labels_B)
        )
        if task == "classify":
            return score_labels(model, ids, attention, labels)[:2]
        return score_targets(model, ids, attention, mask)

    return score


def _refuse_large(base_folder: Path) -> None:
    """The base must fit in full precision, once, to be ranked.

    Raises:
        MachineError: it does not.
    """
    from lorakeet.plan.hardware import read_training_hardware
    from lorakeet.plan.model_facts import read_model_facts

    machine = read_training_hardware()
    plain = 2 if machine.gpus else 4
    need = read_model_facts(base_folder).parameters * (plain + WORK_BYTES)
    if need > machine.usable_bytes:
        raise MachineError(
            f"quantization.kind mixed ranks the layers on the base in full precision, which needs "
            f"about {to_readable_bytes(need)}, and {to_readable_bytes(machine.usable_bytes)} is "
            "free. Take quantization.widths from a run on a larger machine, or kind nf4."
        )


def _find_place(recipe: Recipe, base_folder: Path, data: Any) -> Path | None:
    """Where these widths are kept for another run, or None."""
    from lorakeet.models.quantized_cache import find_home, stamp_files

    home = find_home(base_folder, recipe.quantization)
    if home is None:
        return None
    asked = recipe.quantization.model_dump(mode="json", exclude={"cache"})
    known = [FORMAT, str(base_folder.resolve()), stamp_files(base_folder), asked, recipe.task,
             data.report.get("fingerprint")]  # fmt: skip
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    return home / f"{base_folder.name}-widths-{digest[:16]}.json"


def _read_kept(place: Path | None) -> dict[str, Any] | None:
    """Widths of the cache; None where there are none or the file is damaged."""
    try:
        return read_json(place) if place is not None and place.is_file() else None
    except FileFormatError:
        return None
