"""PEFT's own files of the kinds that differ most: classifiers, embeddings, exclusions."""

import pytest
import torch

from lorakeet.adapters.attach import adapter_parameters, attach
from lorakeet.adapters.files import read_adapter, write_adapter
from lorakeet.adapters.layer import Lora
from tests.families import build, some_ids

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
CASES = {
    "bert": ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "roberta": ("roberta", {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"]}),
    "distilbert": ("distilbert", {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]}),
    "embedding": ("llama", {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens"]}),
    "tied": ("llama-tied", {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens"]}),
    "scaled": ("gemma", {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens"]}),
    "conv1d": ("gpt2", {"task_type": "CAUSAL_LM", "target_modules": ["wte", "c_attn"]}),
    "dora": (
        "gpt2",
        {"task_type": "CAUSAL_LM", "target_modules": ["wte", "c_attn", "c_fc"], "use_dora": True},
    ),
    "dora-scaled": (
        "gemma",
        {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ),
    "exclude": (
        "llama",
        {
            "task_type": "CAUSAL_LM",
            "target_modules": ["q_proj", "v_proj"],
            "exclude_modules": r".*layers\.0.*v_proj",
        },
    ),
}


def answer(model):
    with torch.no_grad():
        return model(input_ids=some_ids()).logits


def move(parameters):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("case", list(CASES))
def test_pefts_files_answer_the_same_here(case, tmp_path):
    family, options = CASES[case]
    theirs = peft.get_peft_model(build(family), peft.LoraConfig(r=2, **options)).eval()
    move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    ours = build(family)
    read_adapter(ours, tmp_path / "a")
    assert torch.allclose(answer(ours), answer(theirs), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("saved", [(), ("classifier",)])
def test_peft_reads_our_classifiers_whatever_is_saved(family, saved, tmp_path):
    ours = build(family)
    attach(ours, Lora(rank=2, modules_to_save=saved))
    move(adapter_parameters(ours).values())
    write_adapter(ours, tmp_path / "a", base="none")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "a").eval()
    assert torch.allclose(answer(theirs), answer(ours), atol=1e-5)
    back = build(family)
    read_adapter(back, tmp_path / "a")
    assert torch.equal(answer(back), answer(ours))


def test_the_padding_row_of_an_adapted_embedding_gets_no_gradient_as_in_peft():
    model = build("llama")
    attach(model, Lora(rank=2, targets=("embed_tokens",)))
    ids = some_ids()
    ids[:, 0] = model.config.pad_token_id
    model(input_ids=ids).logits.square().sum().backward()
    A = adapter_parameters(model)["model.embed_tokens.lora_embedding_A.default"]
    assert A.grad[:, model.config.pad_token_id].abs().sum() == 0 and A.grad.abs().sum() > 0
