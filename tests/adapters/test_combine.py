"""Adapters combined on the disk: exactly where that is possible, like PEFT where it is right."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.combination import KINDS, Combination
from lorakeet.adapters.combine import combine
from lorakeet.adapters.files import WEIGHTS, read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from lorakeet.adapters.manifest import find_changed
from lorakeet.adapters.stored import read_lineage, read_stored
from lorakeet.adapters.task_vectors import Thinning, merge_vectors, seed_of
from lorakeet.base.errors import FileFormatError, RequestError
from lorakeet.base.run_folder import sha256_file
from tests.families import build, some_ids

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
WEIGHTS_2 = (0.7, -0.4)
THINNED = {kind: 0.5 for kind in KINDS if kind.startswith(("ties", "dare"))}


def move(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def make(folder, seed, family="llama", base="base", **settings):
    """An adapter folder as training would leave it."""
    model = build(family)
    attach(model, Lora(**{"rank": 4, "alpha": 8, **settings}), seed=seed)
    move(adapter_parameters(model).values(), seed)
    return write_adapter(model, folder, base=base, lineage={"data": f"data-{seed}", "task": "chat"})


def changes_of(folder):
    return {m: layer.to_change().to_matrix() for m, layer in read_stored(folder).layers.items()}


def how(kind, weights=WEIGHTS_2, **more):
    return Combination(kind=kind, weights=weights, density=THINNED.get(kind), **more)


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for module in found:
        assert torch.allclose(found[module], wanted[module], atol=1e-6), module


@pytest.fixture
def pair(tmp_path):
    return [make(tmp_path / "a", 1), make(tmp_path / "b", 2)]


def wanted_sum(folders, weights):
    own = [changes_of(folder) for folder in folders]
    return {
        m: sum(w * each[m] for w, each in zip(weights, own, strict=True) if m in each)
        for m in {m for each in own for m in each}
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_concatenation_is_the_weighted_sum_for_any_ranks_and_targets(family, tmp_path):
    targets = {"llama": ("q_proj", "embed_tokens"), "gpt2": ("c_attn", "wte"), "bert": ("query",)}
    a = make(tmp_path / "a", 1, family, rank=3, rslora=True)
    b = make(tmp_path / "b", 2, family, rank=5, targets=targets[family])
    report = combine([a, b], tmp_path / "c", how("concatenation"))
    close(changes_of(tmp_path / "c"), wanted_sum([a, b], WEIGHTS_2))
    assert max(layer.error for layer in report.values()) < 1e-6
    assert {layer.rank for layer in report.values()} == ({3, 8} if family == "bert" else {3, 5, 8})


def test_a_combined_adapter_answers_as_the_sum_of_changes_does_here_and_in_peft(pair, tmp_path):
    combine(pair, tmp_path / "c", how("concatenation"))
    model, wanted = build("llama"), wanted_sum(pair, WEIGHTS_2)
    with torch.no_grad():
        for module, change in wanted.items():
            model.get_submodule(module).weight.add_(change.float())
        expected = model(input_ids=some_ids()).logits
        ours, theirs = build("llama"), build("llama")
        read_adapter(ours, tmp_path / "c")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "c").eval()
        assert torch.allclose(ours(input_ids=some_ids()).logits, expected, atol=1e-5)
        assert torch.allclose(theirs(input_ids=some_ids()).logits, expected, atol=1e-5)


def test_ranks_that_differ_by_layer_are_read_by_peft_too(tmp_path):
    a = make(tmp_path / "a", 1, rank_pattern={"q_proj": 2, "down_proj": 7})
    combine([a, make(tmp_path / "b", 2)], tmp_path / "c", how("concatenation"))
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "c").eval()
    ours = build("llama")
    read_adapter(ours, tmp_path / "c")
    with torch.no_grad():
        answers = [model(input_ids=some_ids()).logits for model in (ours, theirs)]
    assert torch.allclose(*answers, atol=1e-5)


def test_a_concatenated_rank_never_passes_the_shorter_side_of_the_matrix(tmp_path):
    folders = [make(tmp_path / str(n), n, rank=12) for n in range(3)]
    report = combine(folders, tmp_path / "c", how("concatenation", (1.0, 0.5, 2.0)))
    assert report["model.layers.0.self_attn.k_proj"].rank == 16
    assert report["model.layers.0.self_attn.q_proj"].rank == 32
    close(changes_of(tmp_path / "c"), wanted_sum(folders, (1.0, 0.5, 2.0)))
    read_adapter(build("llama"), tmp_path / "c")


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_svd_is_the_nearest_matrix_of_its_rank_and_says_how_far_it_is(rank, pair, tmp_path):
    report = combine(pair, tmp_path / "c", how("svd", rank=rank))
    found = changes_of(tmp_path / "c")
    for module, change in wanted_sum(pair, WEIGHTS_2).items():
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        assert torch.allclose(found[module], (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=1e-6)
        error = S[rank:].norm() / S.norm()
        assert abs(report[module].error - error) < 1e-6
        assert report[module].rank == rank


def test_one_adapter_and_a_weight_make_it_stronger_or_weaker(pair, tmp_path):
    for kind, weight in (("linear", 0.25), ("concatenation", -1.0), ("linear", 0.0)):
        report = combine(pair[:1], tmp_path / "c", how(kind, (weight,)))
        close(changes_of(tmp_path / "c"), wanted_sum(pair[:1], (weight,)))
        assert max(layer.error for layer in report.values()) < 1e-6


def test_subtracting_an_adapter_from_itself_leaves_nothing(pair, tmp_path):
    for kind in ("concatenation", "svd", "linear", "ties-svd"):
        report = combine([pair[0], pair[0]], tmp_path / "c", how(kind, (1.0, -1.0)))
        largest = max(change.abs().max() for change in changes_of(tmp_path / "c").values())
        assert largest < 1e-6 and max(layer.error for layer in report.values()) == 0, kind


PEFT_NAMES = {
    "linear": "linear", "concatenation": "cat", "svd": "svd", "ties": "ties",
    "ties-svd": "ties_svd",
}  # fmt: skip


@pytest.mark.parametrize("kind", list(PEFT_NAMES))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", [(0.7, 1.2), (1.0, -0.5)])
def test_the_combination_is_pefts(kind, family, weights, tmp_path):
    if kind.startswith("ties") and weights[1] < 0:
        weights = (0.2, 3.0)  # PEFT elects signs before it turns a vector round
    folders = [make(tmp_path / str(n), n, family) for n in (1, 2)]
    theirs = peft.PeftModel.from_pretrained(build(family), folders[0], adapter_name="a")
    theirs.load_adapter(folders[1], adapter_name="b")
    theirs.add_weighted_adapter(
        ["a", "b"], list(weights), "c", combination_type=PEFT_NAMES[kind], density=0.5
    )
    combine(folders, tmp_path / "c", how(kind, weights))
    for module, change in changes_of(tmp_path / "c").items():
        layer = theirs.base_model.model.get_submodule(module)
        own = layer.get_delta_weight("c").detach().double()
        own = own.T if family == "gpt2" else own
        assert torch.allclose(change, own, atol=1e-5), module


@pytest.mark.parametrize("method", ["linear", "ties", "dare", "dare-ties"])
def test_merging_elements_is_pefts_with_the_same_random_numbers(method):
    from peft.utils import merge_utils

    generator = torch.Generator().manual_seed(0)
    one, weight = torch.randn(40, 30, generator=generator), torch.tensor([0.8])
    torch.manual_seed(seed_of(7, "layer", 0))
    density = () if method == "linear" else (0.3,)
    names = {"linear": "task_arithmetic", "dare": "dare_linear"}
    theirs = getattr(merge_utils, names.get(method, method.replace("-", "_")))
    found = merge_vectors([one], [0.8], Thinning(method=method, density=0.3, seed=7), place="layer")
    assert torch.allclose(found, theirs([one], weight, *density))


def test_dare_keeps_the_expectation_drops_its_share_and_repeats():
    vectors = [torch.linspace(-1, 1, 2000).double(), torch.linspace(2, 0, 2000).double()]
    merged = [
        merge_vectors(vectors, [1.0, 0.5], Thinning(method="dare", density=0.25, seed=s), place="x")
        for s in range(400)
    ]
    again = merge_vectors(
        vectors, [1.0, 0.5], Thinning(method="dare", density=0.25, seed=3), place="x"
    )
    assert torch.equal(again, merged[3]) and not torch.equal(merged[3], merged[4])
    mean = torch.stack(merged).mean(0)
    wanted = vectors[0] + 0.5 * vectors[1]
    assert (mean - wanted).abs().mean() < 0.1
    silent = torch.stack(merged).eq(0).double().mean()
    assert abs(silent - 0.75**2) < 0.01


def test_ties_by_hand():
    vectors = [torch.tensor([3.0, 1.0, -2.0, 0.1]), torch.tensor([1.0, -4.0, -3.0, 0.2])]
    how = Thinning(method="ties", density=0.75)
    # Trimmed: [3 1 -2 0] and [1 -4 -3 0]; signs + - - ; means of the agreeing elements.
    assert merge_vectors(vectors, [1, 1], how, place="x").tolist() == [2.0, -4.0, -2.5, 0.0]
    # Subtracting turns the second round: [-1 4 3 0]; signs + + +.
    assert merge_vectors(vectors, [1, -1], how, place="x").tolist() == [3.0, 2.5, 3.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_an_adapter_that_loads_and_names_its_parents(kind, pair, tmp_path):
    combine(pair, tmp_path / "c", how(kind, seed=5))
    read_adapter(build("llama"), tmp_path / "c")
    lineage = read_lineage(tmp_path / "c")
    assert not find_changed(tmp_path / "c", lineage, (WEIGHTS, "adapter_config.json"))
    assert lineage["task"] == "chat" and "data" not in lineage
    assert lineage["combination"]["kind"] == kind
    assert [each["weight"] for each in lineage["parents"]] == list(WEIGHTS_2)
    for folder, parent in zip(pair, lineage["parents"], strict=True):
        assert parent["sha256"][WEIGHTS] == sha256_file(folder / WEIGHTS)


def test_a_head_of_one_adapter_is_kept_and_two_different_ones_are_refused(tmp_path):
    a = make(tmp_path / "a", 1, "bert", targets=("query",), modules_to_save=("classifier",))
    b = make(tmp_path / "b", 2, "bert", targets=("query",), modules_to_save=("classifier",))
    combine([a], tmp_path / "c", how("linear", (0.5,)))
    kept = load_file(tmp_path / "c" / WEIGHTS)["base_model.model.classifier.weight"]
    assert torch.equal(kept, load_file(a / WEIGHTS)["base_model.model.classifier.weight"])
    with pytest.raises(RequestError, match="trained in full by more than one"):
        combine([a, b], tmp_path / "d", how("linear"))
    assert not (tmp_path / "d").exists()


def test_all_that_does_not_go_together_is_told_at_once(tmp_path):
    a = make(tmp_path / "a", 1)
    b = make(tmp_path / "b", 2, base="another", rank=6, targets=("q_proj", "k_proj"))
    with pytest.raises(RequestError) as told:
        combine([a, b], tmp_path / "x", Combination(kind="ties", weights=(1.0, float("nan"))))
    for words in ("different bases", "not every adapter has", "ranks differ", "density is None",
                  "are not finite numbers"):  # fmt: skip
        assert words in str(told.value), words
    stretched = load_file(a / WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    stretched[key] = torch.cat([stretched[key]] * 2)
    save_file(stretched, a / WEIGHTS)
    (a / "lorakeet.json").unlink()
    with pytest.raises(RequestError, match="q_proj: the sizes differ"):
        combine([a, b], tmp_path / "x", how("svd"), base="one")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("rank,density,kind", [(0, None, "svd"), (3, None, "linear"),
                                               (None, 0.0, "dare"), (None, 0.5, "svd"),
                                               (None, None, "mean")])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(rank, density, kind, pair, tmp_path):
    asked = Combination(kind=kind, weights=(1.0, 1.0), rank=rank, density=density)
    with pytest.raises(RequestError):
        combine(pair, tmp_path / "x", asked)
    assert not (tmp_path / "x").exists()


def test_damaged_adapters_are_all_named(pair, tmp_path):
    tensors = load_file(pair[0] / WEIGHTS)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, pair[0] / WEIGHTS)
    config = json.loads((pair[1] / "adapter_config.json").read_text())
    (pair[1] / "adapter_config.json").write_text(json.dumps({**config, "r": 9}))
    with pytest.raises(FileFormatError) as told:
        combine(pair, tmp_path / "x", how("linear"))
    for words in ("NaN or infinity in", "SHA-256 differs", "are not of rank 9"):
        assert words in str(told.value), words


def test_adapters_whose_names_of_the_base_differ_are_combined_when_the_bytes_are_one(tmp_path):
    folders = []
    for name in ("here/base", "owner/base"):
        model = build("llama")
        attach(model, Lora(rank=2))
        lineage = {"base_sha256": "f" * 64}
        folder = tmp_path / name.replace("/", "-")
        folders.append(write_adapter(model, folder, base=name, lineage=lineage))
    combine(folders, tmp_path / "c", how("linear"))
    assert read_lineage(tmp_path / "c")["base_sha256"] == "f" * 64


@pytest.mark.parametrize(
    ("lineages", "reason"),
    [
        ([{"base_sha256": "e" * 64}, {"base_sha256": "f" * 64}], "different versions of it"),
        ([{"start": "loftq"}, {}], "repair of its rounded base.*--into dequantised"),
    ],
)
def test_adapters_of_other_weights_or_with_a_repair_in_them_are_not_added(
    lineages, reason, tmp_path
):
    folders = []
    for number, lineage in enumerate(lineages):
        model = build("llama")
        attach(model, Lora(rank=2))
        folder = tmp_path / str(number)
        folders.append(write_adapter(model, folder, base="owner/base", lineage=lineage))
    with pytest.raises(RequestError, match=reason):
        combine(folders, tmp_path / "c", how("linear"))
