"""500 random configurations against PEFT: answers, gradients, files both ways, merging."""

from __future__ import annotations

import random
import re
from copy import deepcopy

import pytest
import torch

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.file_names import to_file_names
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora, sizes_of
from lorakeet.adapters.merge import merge, unmerge
from lorakeet.adapters.targets import HEAD_NAMES, linear_names, select_targets
from tests.families import some_ids
from tests.shapes import ENCODERS, FAMILIES, answer_of, build_shaped, draw_shape

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
NUMBER, USUAL = 500, 40
PREFIX = "base_model.model."
RANKS = (1, 2, 3, 4, 7, 8, 16, 32, 64, 100, 128, 200, 256)


def numbered():
    """All seeds, those beyond the usual share marked slow."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n >= USUAL)) for n in range(NUMBER)]


def draw_settings(rng: random.Random, model, family: str) -> Lora:
    """Every option at random; names come from the model."""
    linear = linear_names(model)
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    some = tuple(rng.sample(endings, rng.randint(1, len(endings))))
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    head = [n for n, _ in model.named_modules() if HEAD_NAMES & set(n.split("."))]
    targets = rng.choice(["all-linear", some, rf".*\.({'|'.join(some)})", tuple(linear)])
    if rng.random() < 0.25 and family != "t5" and isinstance(targets, tuple):
        targets = (*targets, embedding)
    layers = ()
    if rng.random() < 0.2 and family != "t5" and embedding not in targets:
        layers = (rng.randrange(model.config.num_hidden_layers),)
    norms = [n for n, _ in model.named_modules() if re.search(r"(norm|ln_f|layer_norm)$", n)]
    saved = ()
    if family in ENCODERS:
        saved = rng.choice([(), tuple(n for n, _ in model.named_children() if n in HEAD_NAMES)])
    elif rng.random() < 0.3:
        saved = tuple(rng.sample(norms, 1))
    excluded = rng.sample(endings, 1) if rng.random() < 0.2 and len(endings) > len(some) else []
    excluded = [] if set(some) <= set(excluded) else excluded  # something must be left (371)
    settings = Lora(
        targets=targets, exclude=(*head, *excluded), layers=layers, modules_to_save=saved,
        bias=rng.choice(["none", "none", "lora_only", "all"]),
    )  # fmt: skip
    paths = select_targets(model, settings)
    most = min(max(sizes_of(model.get_submodule(path))) for path in paths)
    ranks = [r for r in RANKS if r <= most]
    is_patterned = rng.random() < 0.3
    return Lora(
        rank=rng.choice(ranks), alpha=rng.choice([0.5, 1, 8, 16, 32]), targets=targets,
        exclude=settings.exclude, layers=layers, modules_to_save=saved, bias=settings.bias,
        rslora=rng.random() < 0.3, dora=rng.random() < 0.4,
        rank_pattern={rng.choice(endings): rng.choice(ranks)} if is_patterned else {},
        alpha_pattern={rng.choice(endings): 6, rng.choice(linear): 2} if is_patterned else {},
    )  # fmt: skip


def fill(parameters, scale_of, seed: int) -> None:
    """Weights as training leaves them: each change about as large as the base's weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in path or "lora_embedding_A" in path:
                parameter.copy_(noise)
            elif "lora_B" in path or "lora_embedding_B" in path:
                parameter.copy_(noise * 0.03 / scale_of(path) / parameter.shape[1] ** 0.5)
            else:
                parameter.add_(noise * 0.03)


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether nothing differs by more than the tolerance times the largest value (or 1)."""
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1))


def to_peft_name(path: str) -> str:
    """A live parameter of PEFT under its name in a file."""
    name = re.sub(r"\.(modules_to_save\.default|default)(?=\.|$)", "", path)
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


@pytest.mark.parametrize("number", numbered())
def test_a_random_configuration_is_pefts(number, tmp_path):
    rng = random.Random(number)
    family = list(FAMILIES)[number % len(FAMILIES)]
    base = build_shaped(family, draw_shape(rng), number)
    settings = draw_settings(rng, base, family)
    ids = some_ids(rows=2, tokens=8, seed=number)
    ours = deepcopy(base)
    attach(ours, settings, seed=number)
    fill(
        adapter_parameters(ours).items(),
        lambda path: settings.scale_of(path.rpartition(".lora")[0]), number,
    )  # fmt: skip
    answer = answer_of(ours, ids)
    check_merge(ours, answer, ids)
    write_adapter(ours, tmp_path / "ours", base="none")
    theirs = peft.PeftModel.from_pretrained(
        deepcopy(base), tmp_path / "ours", is_trainable=True
    ).eval()
    assert near(answer_of(theirs, ids), answer)
    check_gradients(ours, theirs, ids)
    check_pefts_file(base, settings, ids, tmp_path / "theirs", number)


def check_merge(model, answer, ids) -> None:
    """Merged it answers the same; unmerged every bit is back."""
    with torch.no_grad():
        merge(model)
        assert near(answer_of(model, ids), answer)
        unmerge(model)
        assert torch.equal(answer_of(model, ids), answer)


def check_gradients(ours, theirs, ids) -> None:
    """Equal gradients of everything that is trained here.

    PEFT trains a classifier's head unasked; its parameters are the only ones more.
    """
    for model in (ours, theirs):
        answer_of(model, ids).square().mean().backward()
    own = to_file_names(ours, "default")
    other = {to_peft_name(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    more = other.keys() - own.keys()
    assert not own.keys() - other.keys()
    assert all(HEAD_NAMES & set(name.split(".")) for name in more), more
    largest = max(p.grad.abs().max() for p in own.values() if p.grad is not None)
    for name, parameter in own.items():
        if parameter.grad is None or other[name].grad is None:
            assert parameter.grad is other[name].grad, name
            continue
        # A gradient far below the model's largest is rounding of sums; it is held to that size.
        size = other[name].grad.abs().max().clamp(min=1e-2 * largest)
        assert (parameter.grad - other[name].grad).abs().max() <= 1e-5 * size, name


def check_pefts_file(base, settings: Lora, ids, folder, seed: int) -> None:
    """What PEFT makes of the same settings and saves answers the same here.

    The file is compared with PEFT's own reading of it: PEFT 0.21 writes patterns with sorted
    keys, and as the first match counts, a module that two keys match may come back with
    another alpha than the model had that was saved (seed 107).
    """
    targets = settings.targets
    if settings.layers and isinstance(targets, str):  # PEFT takes layers with lists only
        targets = tuple(select_targets(base, settings))
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, bias=settings.bias,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=list(settings.exclude) or None,
        layers_to_transform=list(settings.layers) or None,
        use_rslora=settings.rslora, use_dora=settings.dora,
        rank_pattern=dict(settings.rank_pattern), alpha_pattern=dict(settings.alpha_pattern),
        modules_to_save=list(settings.modules_to_save) or None,
        task_type="SEQ_CLS" if "Sequence" in type(base).__name__ else None,
        fan_in_fan_out="GPT2" in type(base).__name__,
    )  # fmt: skip
    made = peft.get_peft_model(deepcopy(base), config).eval()
    trained = [(n, p) for n, p in made.named_parameters() if p.requires_grad]
    layers = {n: m for n, m in made.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    scales = {n: m.scaling["default"] for n, m in layers.items()}
    fill(trained, lambda path: scales[path.rpartition(".lora")[0]], seed + 1)
    made.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(deepcopy(base), folder).eval()
    back = deepcopy(base)
    read_adapter(back, folder)
    with torch.no_grad():
        assert near(answer_of(back, ids), answer_of(again, ids))
