"""A run ends with its best weights, and an interrupted one goes on to the very same bits."""

import json

import pytest
import torch

from lorakeet.base.errors import NumericsError, RequestError
from lorakeet.base.records import Validation
from lorakeet.models.load import load_model
from lorakeet.train.stopping import BestTracker
from tests.train.runs import digest_of, make_job, make_model, make_recipe, run_job


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_an_interrupted_and_resumed_run_ends_in_the_same_bits(kind, stop_at, tmp_path):
    recipe = make_recipe(kind, dropout=0.2)
    straight = make_job(tmp_path / "a", recipe, dropout=0.1)
    result, heard = run_job(straight)
    assert result.steps == 9 and not result.interrupted

    stopped = make_job(tmp_path / "b", recipe, dropout=0.1)
    half, first = run_job(stopped, stop_at=stop_at)
    assert half.interrupted and half.steps == stop_at
    torch.manual_seed(99)
    resumed = make_job(tmp_path / "b", recipe, dropout=0.1, resume=True)
    whole, second = run_job(resumed)

    assert digest_of(resumed.model) == digest_of(straight.model)
    assert whole.best_step == result.best_step and whole.best_values == result.best_values
    losses = [e["loss"] for heard_one in (first, second) for e in heard_one.all("step")]
    assert losses == [e["loss"] for e in heard.all("step")]


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps_exactly(tmp_path):
    recipe = make_recipe("full", dropout=0.1)
    _, whole = run_job(make_job(tmp_path / "a", recipe, dropout=0.1))
    losses = [e["loss"] for e in whole.all("step")[3:]]
    killed = make_job(tmp_path / "b", recipe, dropout=0.1)

    class PowerCutError(Exception):
        pass

    looks = iter(range(3))

    def validate():
        if next(looks, None) is None:
            raise PowerCutError
        return Validation(values={"loss": 1.0})

    with pytest.raises(PowerCutError):
        run_job(killed, validate=validate)
    assert [p.name for p in (tmp_path / "b/checkpoints").iterdir()] == ["step-000003"]
    resumed = make_job(tmp_path / "b", recipe, dropout=0.1, resume=True)
    _, heard = run_job(resumed, validate=lambda: Validation(values={}))
    assert [e["step"] for e in heard.all("step")] == [4, 5, 6, 7, 8, 9]
    assert losses == [e["loss"] for e in heard.all("step")]


def test_a_damaged_newest_checkpoint_falls_back_loudly_to_the_same_bits(tmp_path):
    recipe = make_recipe("lora", dropout=0.2)
    straight = make_job(tmp_path / "a", recipe)
    run_job(straight)
    stopped = make_job(tmp_path / "b", recipe)
    run_job(stopped, stop_at=7)
    newest = tmp_path / "b/checkpoints/step-000007/trained.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    resumed = make_job(tmp_path / "b", recipe, resume=True)
    _, heard = run_job(resumed)
    (alarm,) = heard.all("alarm")
    assert alarm["code"] == "damaged-checkpoint" and str(newest) in alarm["message"]
    assert heard.all("step")[0]["step"] == 7
    assert digest_of(resumed.model) == digest_of(straight.model)


def test_resuming_without_any_checkpoint_starts_anew_and_says_so(tmp_path):
    _, heard = run_job(make_job(tmp_path, make_recipe(), resume=True))
    assert heard.all("alarm")[0]["code"] == "no-checkpoint"
    assert heard.all("step")[0]["step"] == 1


def test_the_best_weights_are_left_in_the_model(tmp_path):
    job = make_job(tmp_path, make_recipe("full"))
    values, digests = iter([5.0, 4.0, 1.0, 3.0, 2.0, 6.0]), []

    def validate():
        digests.append(digest_of(job.model))
        return Validation(values={"loss": next(values)})

    result, heard = run_job(job, validate=validate)
    assert [e["step"] for e in heard.all("evaluation")] == [0, 2, 4, 6, 8, 9]
    assert result.best_step == 4 and result.best_values == {"loss": 1.0}
    assert digest_of(job.model) == digests[2] != digests[-1]
    assert not job.model.training


def test_patience_ends_the_run(tmp_path):
    stopping = {"metric": "perplexity", "patience": 2}
    recipe = make_recipe("lora", early_stopping=stopping)
    values = iter([3.0, 2.0, 2.5, 2.0])
    result, heard = run_job(
        make_job(tmp_path, recipe),
        validate=lambda: Validation(values={"perplexity": next(values)}),
    )
    assert result.steps == 6 and result.best_step == 2
    (event,) = heard.all("early_stop")
    assert event["best_step"] == 2 and event["step"] == 6


def test_a_metric_that_the_validation_does_not_measure_is_a_wrong_request():
    tracker = BestTracker(metric="f1", patience=1)
    with pytest.raises(RequestError, match="f1.*loss"):
        tracker.observe(1, {"loss": 1.0})


def test_a_run_without_validation_keeps_its_last_weights(tmp_path):
    job = make_job(tmp_path, make_recipe("lora"))
    result, heard = run_job(job, validate=lambda: Validation(values={}))
    assert result.steps == 9 and result.best_step == -1 and not heard.all("evaluation")


def test_step_events_carry_what_monitors_need_and_are_json(tmp_path):
    _, heard = run_job(make_job(tmp_path, make_recipe()))
    steps = heard.all("step")
    assert [e["step"] for e in steps] == list(range(1, 10))
    assert steps[-1]["epoch"] == pytest.approx(3)
    assert all(e["tokens_per_s"] > 0 and e["num_targets"] < e["num_tokens"] for e in steps)
    json.dumps(heard.events)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_numbers_that_are_not_finite_stop_the_run_at_their_step(tmp_path):
    job = make_job(tmp_path, make_recipe("full"))
    with torch.no_grad():
        job.model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(NumericsError, match="step 1"):
        run_job(job, validate=lambda: Validation(values={}))
    assert not (tmp_path / "checkpoints").exists()


def test_a_real_model_learns_in_full_and_with_an_adapter(tiny_llama, tmp_path):
    for kind in ("full", "lora"):
        model, _ = load_model(str(tiny_llama))
        recipe = make_recipe(kind, learning_rate=5e-3, epochs=6)
        result, heard = run_job(make_job(tmp_path / kind, recipe, model=model))
        first = heard.all("evaluation")[0]["values"]["loss"]
        assert result.best_values["loss"] < 0.8 * first and result.best_step > 0


def test_make_model_is_the_same_twice():
    assert digest_of(make_model()) == digest_of(make_model())
