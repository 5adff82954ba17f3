"""The loss of scored positions is the loss of the model's own logits, for every family."""

import pytest
import torch
import transformers as t
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.adapters.attach import attach
from lorakeet.adapters.layer import Lora
from lorakeet.base.errors import RequestError
from lorakeet.models import frozen_head, score
from lorakeet.models.head import read_head_facts
from lorakeet.models.score import score_labels, score_targets
from tests.families import DECODERS, ENCODERS, build, some_ids

torch.set_num_threads(1)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SIZES |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
AWKWARD = {
    "cohere, which scales": lambda: t.CohereForCausalLM(t.CohereConfig(**SIZES)),
    "granite, which divides": lambda: t.GraniteForCausalLM(
        t.GraniteConfig(**SIZES, logits_scaling=8.0)
    ),
    "recurrent gemma, which bends": lambda: t.RecurrentGemmaForCausalLM(
        t.RecurrentGemmaConfig(
            **SIZES | {"num_hidden_layers": 3}, lru_width=32, logits_soft_cap=0.5
        )
    ),
    "bert decoder, which transforms": lambda: t.BertLMHeadModel(
        t.BertConfig(**SIZES, is_decoder=True)
    ),
}


def build_loud(family):
    """A model whose logits are large enough for a bend or a scale to show."""
    torch.manual_seed(0)
    model = {**DECODERS, **AWKWARD}[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def some_batch():
    ids = some_ids()
    attention = torch.ones_like(ids, dtype=torch.bool)
    attention[0, 9:] = False
    mask = attention.clone()
    mask[:, :3] = False
    mask[1, 6] = False
    return ids, attention, mask


def naive_loss(model, ids, attention, mask):
    logits = model(input_ids=ids, attention_mask=attention.long(), use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1][mask[:, 1:]].float(), ids[:, 1:][mask[:, 1:]], reduction="sum"
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_naive(model):
    ids, attention, mask = some_batch()
    wanted = naive_loss(model, ids, attention, mask)
    loss, count = score_targets(model, ids, attention, mask)
    assert count == int(mask.sum())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    expected, found = gradients(model, wanted), gradients(model, loss)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name


@pytest.mark.parametrize("family", [*DECODERS, *AWKWARD])
def test_loss_and_gradients_equal_the_naive_ones_with_a_trained_head(family):
    assert_equal_to_naive(build_loud(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi"])
def test_loss_and_gradients_equal_the_naive_ones_with_a_frozen_head(family):
    model = build_loud(family)
    attach(model, Lora(rank=4, alpha=8))
    assert_equal_to_naive(model)


@pytest.mark.parametrize(
    "settings",
    [Lora(rank=4, alpha=8, targets="lm_head"), Lora(rank=4, alpha=8, modules_to_save=("lm_head",))],
    ids=["adapted", "saved"],
)
def test_a_head_with_an_adapter_or_a_trained_copy_gets_its_gradient(settings, monkeypatch):
    monkeypatch.setattr(score, "CHUNK_LOGITS", 1)
    model = build_loud("llama")
    attach(model, settings)
    assert_equal_to_naive(model)


@pytest.mark.parametrize("family", DECODERS)
def test_the_families_we_name_take_the_fast_path(family):
    facts = read_head_facts(build(family))
    assert facts.is_plain and facts.is_causal


@pytest.mark.parametrize("family", AWKWARD)
def test_a_head_that_does_more_than_multiply_is_found_out(family):
    assert not read_head_facts(build_loud(family)).is_plain


def test_the_probe_leaves_randomness_modes_and_gradients_alone():
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    read_head_facts(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_broken_weights_give_a_loss_that_is_not_finite_and_are_asked_again():
    model = build("llama")
    model.model.norm.weight.data[0] = float("nan")
    assert not torch.isfinite(score_targets(model, *some_batch())[0])
    model.model.norm.weight.data[0] = 1.0
    assert read_head_facts(model).is_plain


def test_an_encoder_that_sees_the_future_is_refused():
    model = t.BertForMaskedLM(t.BertConfig(**SIZES)).eval()
    with pytest.raises(RequestError, match="task: classify"):
        score_targets(model, *some_batch())


def test_bfloat16_models_keep_the_fast_path():
    model = build("llama").to(torch.bfloat16)
    assert read_head_facts(model).is_plain and read_head_facts(model).is_causal
    ids, attention, mask = some_batch()
    loss, _ = score_targets(model, ids, attention, mask)
    assert float(loss) == pytest.approx(float(naive_loss(model, ids, attention, mask)), rel=1e-2)
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("is_trained", [True, False])
def test_the_whole_logits_never_exist(is_trained, monkeypatch):
    vocabulary = 5000
    monkeypatch.setattr(score, "CHUNK_LOGITS", 16 * vocabulary)
    monkeypatch.setattr(frozen_head, "BLOCK_LOGITS", 16 * vocabulary)
    monkeypatch.setattr(frozen_head, "FEWEST_IDS", 1)
    config = t.LlamaConfig(**SIZES | {"vocab_size": vocabulary})
    model = t.LlamaForCausalLM(config).requires_grad_(is_trained)
    model.model.embed_tokens.weight.requires_grad_(True)
    ids = torch.randint(3, vocabulary, (4, 64))
    everything = torch.ones_like(ids, dtype=torch.bool)
    mask = everything.clone()
    mask[:, 0] = False
    read_head_facts(model)
    with LargestTensor() as seen:
        score_targets(model, ids, everything, mask)[0].backward()
    assert seen.largest <= max(16 * vocabulary, vocabulary * 32) < ids.numel() * vocabulary / 2


def test_chunks_and_padding_change_nothing(monkeypatch):
    model = build_loud("qwen2")
    ids, attention, mask = some_batch()
    whole = score_targets(model, ids, attention, mask)[0]
    expected = gradients(model, whole)
    monkeypatch.setattr(score, "CHUNK_LOGITS", 1)
    apart = sum(
        score_targets(model, ids[i : i + 1, :n], attention[i : i + 1, :n], mask[i : i + 1, :n])[0]
        for i, n in enumerate(attention.sum(1).tolist())
    )
    assert float(apart) == pytest.approx(float(whole), rel=1e-6)
    for name, gradient in gradients(model, apart).items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_frozen_head_in_blocks_gives_the_loss_and_gradient_of_the_whole(has_bias, monkeypatch):
    monkeypatch.setattr(frozen_head, "BLOCK_LOGITS", 1)
    monkeypatch.setattr(frozen_head, "FEWEST_IDS", 7)  # 50 ids: eight blocks, the last of one
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 50, bias=has_bias).requires_grad_(False)
    head.weight[3:9] *= 200  # one position's largest logit grows from block to block
    hidden, targets = torch.randn(9, 6, requires_grad=True), torch.arange(9) * 6 + 1
    wanted = torch.nn.functional.cross_entropy(head(hidden).double(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(3 * wanted, hidden)
    loss = score.score_hidden(hidden, head, targets)
    (found,) = torch.autograd.grad(3 * loss, hidden)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad():
        assert score.score_hidden(hidden, head, targets).item() == loss.item()


def test_a_batch_without_targets_is_refused():
    ids, attention, mask = some_batch()
    with pytest.raises(RequestError, match="target"):
        score_targets(build("llama"), ids, attention, torch.zeros_like(mask))


@pytest.mark.parametrize("family", ENCODERS)
def test_labels_are_scored_as_a_sum_over_rows(family):
    model = build(family)
    ids, attention, _ = some_batch()
    labels = torch.tensor([0, 2, 1])
    loss, count, logits = score_labels(model, ids, attention, labels)
    rows = [
        score_labels(model, ids[i : i + 1, :n], attention[i : i + 1, :n], labels[i : i + 1])[0]
        for i, n in enumerate(attention.sum(1).tolist())
    ]
    assert count == 3 and logits.shape == (3, 3)
    assert float(loss) == pytest.approx(sum(map(float, rows)), rel=1e-5)
