"""One sample from a document to a served answer; ``pytest tests/walk -s`` prints each record."""

import json

import torch

from lorakeet.adapters.attach import no_adapter
from lorakeet.adapters.files import read_adapter
from lorakeet.api.training import train
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.records import Turn
from lorakeet.data.clean import clean_sample
from lorakeet.data.encode import encode_sample, explain
from lorakeet.data.schemas import to_sample
from lorakeet.data.sources import read_rows
from lorakeet.export.merged import MergeOrder, write_merged
from lorakeet.infer.generate import encode_prompt, generate
from lorakeet.infer.sampling import SamplingSettings
from lorakeet.models.load import load_model, read_tokenizer
from lorakeet.pipeline import ask, list_models
from lorakeet.serve.http import start_background_server

QUESTION, ANSWER = "Who keeps the lighthouse?", "Clara"


def test_one_sample_from_a_file_to_a_served_answer(tmp_path):
    rows = [{"instruction": QUESTION, "output": ANSWER}] + [
        {"instruction": f"Who keeps mill {n}?", "output": f"Keeper {n}"} for n in range(7)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_from_dict({
        "base": "starter", "data": {"train": str(path), "validation": 0, "max_tokens": 128},
        "method": {"rank": 8}, "train": {"epochs": 40, "batch_size": 8, "learning_rate": 5e-3},
    })  # fmt: skip

    raw = next(iter(read_rows(str(path), on_drop=print)))
    print(f"\n1 RawRow         {raw}")
    assert raw.origin.line == 1
    sample = clean_sample(to_sample(raw, task="chat", settings=recipe.data))
    print(f"2 Conversation   {sample}")
    tokenizer = read_tokenizer("starter")
    encoded = encode_sample(sample, tokenizer, max_tokens=128)
    runs = explain(encoded, tokenizer)
    print(f"3 EncodedSample  {len(encoded.ids)} tokens, {int(encoded.mask.sum())} trained")
    print(f"  runs           {runs}")
    assert [text for text, is_trained in runs if is_trained] == [f"{ANSWER}<|im_end|>"]

    events = []
    trained = train(recipe, tmp_path / "run", emit=lambda kind, **f: events.append((kind, f)))
    steps = [fields for kind, fields in events if kind == "step"]
    print(f"4 StepReport     first loss {steps[0]['loss']:.3f}, last {steps[-1]['loss']:.3f}")
    assert steps[-1]["loss"] < 0.2 * steps[0]["loss"]
    print(f"5 adapter folder {sorted(p.name for p in trained.adapter.iterdir())}")

    model, tokenizer = load_model("starter")
    read_adapter(model, trained.adapter)
    ids = [encode_prompt(tokenizer, [Turn(role="user", content=QUESTION)])]
    settings = SamplingSettings(max_new_tokens=16)
    tuned = generate(model, tokenizer, ids, settings)[0]
    with no_adapter(model), torch.no_grad():
        base = generate(model, tokenizer, ids, settings)[0]
    print(f"6 Completion     base {base.text!r}, tuned {tuned.text!r}")
    assert tuned.text.strip() == ANSWER != base.text.strip()

    order = MergeOrder(base="starter", adapter_folder=trained.adapter)
    proof = write_merged(order, tmp_path / "merged")
    print(f"7 MergeProof     passed {proof.passed}: {proof.figures}")
    assert proof.passed

    with start_background_server("starter", {"mine": trained.adapter}) as server:
        names = list_models(server.address)
        served = {name: ask(server.address, name, QUESTION) for name in names}
    print(f"8 served         {served}")
    assert served.pop("mine") == ANSWER
    assert list(served.values()) == [base.text.strip()]
