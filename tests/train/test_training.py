"""The step is exact, the run resumes bit for bit, and the best weights stay."""

import copy
import json

import numpy as np
import pytest
import torch

from lorakeet.base.errors import NumericsError
from lorakeet.base.recipe import TrainSettings
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.base.records import EncodedSample, Origin, Validation
from lorakeet.base.run_folder import RunFolder
from lorakeet.data.prepare import PreparedData
from lorakeet.data.shards import ShardReader, write_shards
from lorakeet.models.methods import METHODS, apply_method
from lorakeet.models.score import score_targets
from lorakeet.train.checkpoint import collect_state, read_newest_checkpoint
from lorakeet.train.fit import train_model
from lorakeet.train.loop import TrainJob
from lorakeet.train.optimizer import build_optimizer
from lorakeet.train.schedule import rate_at
from lorakeet.train.step import StepRunner, score_batch
from lorakeet.train.stopping import BestTracker
from tests.families import DECODERS, ENCODERS, build, some_ids


def rows(count=24, seed=0, labels=False):
    rng = np.random.default_rng(seed)
    made = []
    for line in range(1, count + 1):
        length = int(rng.integers(5, 20))
        ids = rng.integers(3, 96, length).astype(np.int32)
        mask = rng.random(length) < 0.6
        mask[0], mask[-1] = False, True
        if labels:
            mask[:] = False
        label = int(rng.integers(3)) if labels else -1
        made.append(EncodedSample(ids=ids, mask=mask, label=label,
                                  origin=Origin(path="rows", line=line)))  # fmt: skip
    return made


def job(folder, *, method=None, train=None, resume=False, family="llama"):
    is_classifier = family in ENCODERS
    if not (folder / "data").exists():
        write_shards([(r, 0) for r in rows(labels=is_classifier)], folder / "data" / "train")
        write_shards([(r, 0) for r in rows(6, 1, is_classifier)], folder / "data" / "validation")
    recipe = recipe_from_dict({
        "base": "b", "task": "classify" if is_classifier else "chat", "data": {"train": "rows"},
        "method": method or {"kind": "lora", "rank": 4, "dropout": 0.1},
        "train": {"batch_size": 4, "epochs": 3, "learning_rate": 1e-2, "early_stopping": None,
                  "checkpoint_every_steps": 5, **(train or {})},
        "quantization": {"kind": "nf4" if (method or {}).get("start") == "loftq" else "none"},
    })  # fmt: skip
    model = build(family)
    apply_method(model, recipe.method, task=recipe.task, seed=0)
    data = PreparedData(
        train=ShardReader(folder / "data" / "train"),
        validation=ShardReader(folder / "data" / "validation"), label_names=(), report={},
    )  # fmt: skip
    run = RunFolder(folder)
    return TrainJob(model=model, recipe=recipe, data=data, run=run, pad_id=0,
                    resume_from=run.checkpoints if resume else None)  # fmt: skip


def run(made, **options):
    events = []

    def validate():
        batch = collate_all(made.data.validation)
        loss = float(score_batch(made.model, batch, "cpu")) / batch.num_targets
        return Validation(values={"loss": loss, "perplexity": float(np.exp(loss))})

    result = train_model(
        made,
        emit=lambda kind, **f: events.append({"kind": kind, **f}),
        validate=validate,
        **options,
    )
    return result, events


def collate_all(reader):
    from lorakeet.data.collate import collate

    return collate([reader[i] for i in range(len(reader))], 0)


def stop_after(step):
    seen = iter(range(1, 1000))
    return lambda: next(seen) >= step


@pytest.mark.parametrize("family", list(DECODERS))
def test_the_chunked_score_equals_the_models_own_logits(family):
    model = build(family).train(False)
    reference = copy.deepcopy(model)
    ids = some_ids()
    attention = torch.ones_like(ids, dtype=torch.bool)
    attention[1, 8:] = False
    mask = torch.zeros_like(attention)
    mask[:, 3:7] = True
    ours, count = score_targets(model, ids, attention, mask)
    logits = reference(input_ids=ids, attention_mask=attention.long()).logits[:, :-1]
    theirs = torch.nn.functional.cross_entropy(
        logits[mask[:, 1:]], ids[:, 1:][mask[:, 1:]], reduction="sum"
    )
    assert count == 12
    assert torch.allclose(ours, theirs, rtol=1e-6)
    ours.backward()
    theirs.backward()
    for (name, one), two in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            assert torch.allclose(one.grad, two.grad, atol=1e-5), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_a_frozen_head_gives_the_same_gradients_to_an_adapter(family):
    grads = []
    for is_frozen in (True, False):
        model = build(family)
        apply_method(model, recipe_method(), task="chat", seed=1)
        if not is_frozen:
            model.get_output_embeddings().weight.requires_grad_(True)
        mask = torch.ones(3, 12, dtype=torch.bool)
        mask[:, 0] = False
        loss, _ = score_targets(model, some_ids(), torch.ones_like(mask), mask)
        loss.backward()
        grads.append([p.grad for n, p in model.named_parameters() if "lora_B" in n])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def recipe_method():
    return recipe_from_dict({"base": "b", "data": {"train": "x"}}).method


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_accumulation_equals_the_big_batch(family):
    results = []
    for tokens in (10_000, 64, 1):
        model = build(family)
        method = recipe_method()
        apply_method(model, method, task="classify" if family == "bert" else "chat", seed=0)
        named = list(model.named_parameters())
        settings = TrainSettings(learning_rate=1e-3)
        runner = StepRunner(
            model=model, optimizer=build_optimizer(named, settings, method), pad_id=0,
            parameters=tuple(p for _, p in named if p.requires_grad), micro_batch_tokens=tokens,
            max_gradient_norm=1.0,
        )  # fmt: skip
        result = runner.run(rows(8, labels=family == "bert"), (0, 1))
        results.append((result, collect_state(model)))
    (first, weights), *others = results
    for result, other in others:
        assert abs(result.loss - first.loss) < 1e-6
        assert abs(result.gradient_norm - first.gradient_norm) < 1e-5
        assert all(torch.allclose(weights[n], other[n], atol=1e-6) for n in weights)


@pytest.mark.parametrize("row", METHODS)
@pytest.mark.parametrize("stop", [1, 7, 10])
def test_a_resumed_run_ends_with_bit_identical_weights(tmp_path, row, stop):
    method = {"rank": 4, "dropout": 0.1, **METHODS[row].options}
    if row == "adalora":
        method["adalora"] = {"target_rank": 2, "every_steps": 2}
    straight = job(tmp_path / "straight", method=method)
    run(straight)
    first = job(tmp_path / "cut", method=method)
    result, _ = run(first, stop_requested=stop_after(stop))
    assert result.interrupted and result.steps == stop
    second = job(tmp_path / "cut", method=method, resume=True)
    result, events = run(second)
    assert result.steps == 18 and not result.interrupted
    assert [e["step"] for e in events if e["kind"] == "step"] == list(range(stop + 1, 19))
    expected, found = collect_state(straight.model), collect_state(second.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path):
    made = job(tmp_path)
    run(made)
    newest, older = sorted(made.run.checkpoints.glob("step-*"), reverse=True)[:2]
    file = newest / "trained.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    told = []
    state = read_newest_checkpoint(made.run.checkpoints, lambda kind, **f: told.append(f))
    assert f"step-{state.step:06d}" == older.name
    assert told[0]["code"] == "damaged-checkpoint" and "trained.safetensors" in told[0]["message"]


def test_early_stopping_keeps_the_best_weights(tmp_path):
    made = job(tmp_path, train={"learning_rate": 0.5, "early_stopping": {"patience": 2},
                                "evaluate_every_steps": 1, "epochs": 20})  # fmt: skip
    result, events = run(made)
    looks = [e for e in events if e["kind"] == "evaluation"]
    best = min(looks, key=lambda e: e["values"]["loss"])
    assert result.best_step == best["step"] and result.steps == best["step"] + 2
    assert any(e["kind"] == "early_stop" for e in events)
    batch = collate_all(made.data.validation)
    loss = float(score_batch(made.model, batch, "cpu")) / batch.num_targets
    assert abs(loss - best["values"]["loss"]) < 1e-6


def test_a_loss_that_is_not_finite_stops_the_step_and_names_the_rows(tmp_path):
    made = job(tmp_path)
    with torch.no_grad():
        made.model.get_submodule("model.norm").weight.fill_(float("nan"))
    before = collect_state(made.model)
    with pytest.raises(NumericsError, match="step 1: the loss is nan.*rows line"):
        run(made)
    assert all(torch.equal(t, before[n]) for n, t in collect_state(made.model).items())
    assert not list(made.run.checkpoints.glob("step-*"))


def test_the_loss_falls_for_a_classifier_too(tmp_path):
    _, events = run(job(tmp_path, family="distilbert", train={"epochs": 15}))
    losses = [e["loss"] for e in events if e["kind"] == "step"]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_warm_up_peak_and_stay_positive(schedule):
    settings = TrainSettings(learning_rate=1.0, schedule=schedule, warmup_fraction=0.1)
    rates = [rate_at(step, 50, settings) for step in range(1, 51)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert max(rates) == 1.0 and min(rates) > 0
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_the_tracker_watches_loss_where_a_classifier_has_no_perplexity():
    settings = recipe_from_dict({"base": "b", "data": {"train": "x"}}).train.early_stopping
    tracker = BestTracker.build(settings, is_classifier=True)
    assert tracker.observe(1, {"loss": 1.0}) and not tracker.observe(2, {"loss": 1.5})
    again = BestTracker.build(settings, is_classifier=True)
    again.restore(json.loads(json.dumps(tracker.to_progress())))
    assert again == tracker
