"""Watchers read events only; alarms sound once an episode and say what to do."""

import io
import random

import pytest
from rich.console import Console

from lorakeet.monitor.alarms import AlarmWatch
from lorakeet.monitor.console import RunConsole
from lorakeet.monitor.gauges import read_progress, read_series
from lorakeet.monitor.sinks import fan_out
from lorakeet.monitor.tensorboard import TensorboardSink


def step(number, loss=1.0, norm=1.0):
    return {"step": number, "loss": loss, "gradient_norm": norm, "learning_rate": 1e-3,
            "tokens_per_s": 10.0, "num_steps": 200, "duration_s": 0.5}  # fmt: skip


def alarms(events):
    heard = []
    watch = AlarmWatch(lambda kind, **fields: heard.append((fields["code"], fields["step"])))
    for kind, fields in events:
        watch(kind, **fields)
    return heard


def look(number, loss, train_loss):
    return ("evaluation", {"step": number, "values": {"loss": loss}, "train_loss": train_loss})


def test_a_healthy_run_sounds_nothing():
    events = [("step", step(n, 3.0 * 0.98**n)) for n in range(1, 200)]
    assert alarms([*events, look(100, 1.0, 0.9), look(200, 0.9, 0.85)]) == []


def test_overfitting_sounds_once_when_the_gap_opens():
    events = [look(10, 1.0, 1.0), look(20, 0.9, 0.8), look(30, 1.2, 0.5), look(40, 1.4, 0.3)]
    assert alarms(events) == [("overfit", 30)]


def test_a_spike_sounds_and_may_sound_again_after_it_went():
    losses = [1.0] * 25 + [9.0, 9.0] + [1.0] * 20 + [9.0]
    events = [("step", step(n, loss)) for n, loss in enumerate(losses, 1)]
    assert [code for code, _ in alarms(events)] == ["spike", "spike"]


def test_a_dead_gradient_a_zero_loss_and_a_plateau_are_noticed():
    assert alarms([("step", step(1, 1.0, 0.0))]) == [("stuck", 1)]
    assert alarms([("step", step(1, 0.0))]) == [("zero", 1)]
    assert ("plateau", 120) in alarms([("step", step(n, 1.0)) for n in range(1, 130)])


def test_degenerate_answers_are_noticed():
    heard = alarms([("sample_answers", {"step": 5, "answers": [("q", "la la la la la la")]})])
    assert heard == [("repeating", 5)]
    assert alarms([("sample_answers", {"step": 5, "answers": [("q", "A fine day.")]})]) == []


def test_series_and_progress_come_from_events_alone():
    events = [{"kind": "run_started"}, *({"kind": "step", **step(n, 1 / n)} for n in (1, 2, 2))]
    assert read_series(events, "step", "loss") == [(1, 1.0), (2, 0.5)]
    progress = read_progress(events)
    assert (progress.state, progress.step, progress.remaining_s) == ("running", 2, 99.0)
    assert read_progress([*events, {"kind": "run_finished"}]).state == "finished"
    assert read_progress([]).state == "waiting"


def test_the_console_is_calm_in_a_file_and_shows_what_matters():
    text = io.StringIO()
    with RunConsole(Console(file=text, width=120)) as console:
        console.emit("stage_started", stage="train")
        console.emit("path", packing=True, units={"gate": 30}, saved_fraction=0.38)
        for number in range(1, 201):
            console.emit("step", **step(number))
        console.emit("evaluation", step=200, values={"loss": 0.5, "perplexity": 1.65})
        console.emit("sample_answers", step=200, answers=[("[q]", "[bold]a")])
        console.emit("alarm", code="spike", message="up", step=7)
        console.emit("stage_finished", stage="train", duration_s=75)
    told = text.getvalue()
    assert told.count("step ") < 20
    assert "packed" in told and "30 x gate" in told
    assert "38 % of tokens are shared, so 1.6x" in told
    assert (
        "perplexity 1.65" in told and "[bold]a" in told and "spike" in told and "1 min 15" in told
    )


def test_tensorboard_gets_scalars_and_text_without_torch(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = fan_out(TensorboardSink(tmp_path / "tb"))
    sink("step", **step(1, 2.0))
    sink("evaluation", step=1, values={"perplexity": 7.0}, train_loss=None)
    sink("sample_answers", step=1, answers=[("你好", "hi")])
    sink("alarm", code="spike", message="up", step=1)
    sink("run_finished")
    read = accumulator.EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    assert read.Scalars("train/loss")[0].value == 2.0
    assert read.Scalars("validation/perplexity")[0].value == 7.0
    assert {"answers", "alarms"} <= set(read.Tags()["tensors"])


def noisy(level, count, seed):
    draw = random.Random(seed)
    return [level * draw.uniform(0.9, 1.1) for _ in range(count)]


@pytest.mark.parametrize("seed", range(10))
def test_a_noisy_plateau_is_told_once_however_long_it_lasts(seed):
    events = [("step", step(n, loss)) for n, loss in enumerate(noisy(1.0, 2000, seed), 1)]
    assert [code for code, _ in alarms(events)] == ["plateau"]


def test_a_second_plateau_lower_down_is_told_again():
    losses = noisy(1.0, 400, 1) + noisy(0.5, 400, 2)
    heard = alarms([("step", step(n, loss)) for n, loss in enumerate(losses, 1)])
    assert [code for code, _ in heard] == ["plateau", "plateau"]


def test_zeros_that_come_and_go_are_one_episode():
    events = [("step", step(n, 1.0, n % 2)) for n in range(1, 60)]
    assert [code for code, _ in alarms(events)] == ["stuck"]


def test_an_overfit_run_is_told_once_though_its_validation_wavers():
    events = [look(10, 1.0, 1.0), look(20, 1.5, 0.5), look(30, 0.99, 0.5), look(40, 1.6, 0.5)]
    assert alarms(events) == [("overfit", 20)]


def test_losses_that_differ_by_their_nature_are_no_spikes_and_no_plateau():
    draw = random.Random(1)
    losses = [6.0 if n % 9 == 0 else draw.uniform(0.2, 2.0) for n in range(600)]
    assert not alarms([("step", step(n, loss)) for n, loss in enumerate(losses, 1)])


def test_no_plateau_while_validation_improves():
    events = []
    for n in range(1, 601):
        events.append(("step", step(n, 1.0)))
        if n % 50 == 0:
            values = {"loss": 2.0 - n / 600}
            events.append(("evaluation", {"step": n, "values": values, "train_loss": 1.0}))
    assert "plateau" not in [code for code, _ in alarms(events)]
    steps_only = [event for event in events if event[0] == "step"]
    assert [code for code, _ in alarms(steps_only)] == ["plateau"]
