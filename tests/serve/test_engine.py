import threading
import time
from pathlib import Path

import pytest

from lorakeet.adapters.files import read_adapter
from lorakeet.base.errors import LorakeetError, MachineError, RequestError
from lorakeet.base.records import Turn
from lorakeet.infer.generate import generate
from lorakeet.infer.sampling import SamplingSettings
from lorakeet.models.load import load_model
from lorakeet.serve.engine import Engine, EngineLimits, PromptTooLongError
from lorakeet.serve.scheduler import BatchLimits, QueueFullError
from lorakeet.serve.ticket import Failed, Finished, Job

QUESTIONS = ("hello", "what is law?", "请介绍一下你自己", "a longer question about many things")


@pytest.fixture(scope="module")
def engine(base_folder, adapters):
    engine = Engine(str(base_folder), adapters)
    yield engine
    engine.close()


def job_for(engine, question, *, model, **sampling):
    prompt = engine.encode_chat([Turn(role="user", content=question)])
    return Job(model=model, prompt=prompt, sampling=SamplingSettings(**sampling))


def isolated_answer(base_folder, folder, job):
    model, tokenizer = load_model(str(base_folder))
    if folder:
        read_adapter(model, folder)
    return generate(model, tokenizer, [job.prompt], job.sampling)[0]


def test_mixed_concurrent_answers_equal_isolated_ones(engine, base_folder, adapters):
    folders = {"tiny-chat": None, **adapters}
    jobs = [
        job_for(engine, question, model=name, max_new_tokens=12 + 3 * number)
        for number, question in enumerate(QUESTIONS)
        for name in folders
    ]
    answers = [None] * len(jobs)

    def ask(place):
        answers[place] = engine.complete(jobs[place])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job, answer in zip(jobs, answers, strict=True):
        assert answer == isolated_answer(base_folder, folders[job.model], job)
    assert len({answer.text for answer in answers[:3]}) == 3, "the adapters change nothing"
    assert engine.counts.batches < len(jobs)


def test_equal_seeds_give_equal_answers_and_others_do_not(engine):
    asked = {"model": "law", "temperature": 1.0, "max_new_tokens": 24}
    first, again, other = (
        engine.complete(job_for(engine, "hi", **asked, seed=seed)).text for seed in (5, 5, 6)
    )
    assert first == again != other


def test_a_stream_joined_is_the_whole_answer(engine):
    job = job_for(engine, "hello", model="med", max_new_tokens=30)
    assert "".join(engine.stream(job)) == engine.complete(job).text


def test_answers_are_clamped_and_long_prompts_refused(engine):
    prompt = (5,) * 250
    sampling = SamplingSettings(max_new_tokens=1000)
    job = Job(model="law", prompt=prompt, sampling=sampling)
    assert engine.complete(job).num_completion_tokens <= 6
    with pytest.raises(PromptTooLongError, match="256"):
        engine.complete(Job(model="law", prompt=(5,) * 256, sampling=sampling))
    for wrong in ((), (10**6,), (-1,)):
        with pytest.raises(RequestError):
            engine.complete(Job(model="law", prompt=wrong, sampling=sampling))


def test_replacing_a_name_serves_the_new_content_and_drops_the_old(engine, adapters):
    job = job_for(engine, "hello", model="changing", max_new_tokens=10)
    answers = {}
    for name in ("law", "med"):
        engine.load_adapter("changing", adapters[name])
        answers[name] = engine.complete(job).text
        same = job_for(engine, "hello", model=name, max_new_tokens=10)
        assert answers[name] == engine.complete(same).text
    assert len(engine.store.resident) == 2
    engine.unload_adapter("changing")
    with pytest.raises(LorakeetError, match="law, med"):
        engine.complete(job)


def test_a_request_in_flight_keeps_its_adapter_through_an_unload(base_folder, adapters):
    engine = Engine(str(base_folder), {"law": adapters["law"]})
    job = job_for(engine, "hello", model="law", max_new_tokens=100)
    expected = isolated_answer(base_folder, adapters["law"], job).text
    stream = engine.stream(job)
    text = next(stream)
    engine.unload_adapter("law")
    assert text + "".join(stream) == expected
    deadline = time.monotonic() + 5
    while engine._residents._attached and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine._residents._attached and not engine.store.resident
    engine.close()


def test_leaving_a_stream_frees_the_worker(engine):
    before = engine.counts.completion_tokens
    for _ in engine.stream(job_for(engine, "hello", model="law", max_new_tokens=200)):
        break
    engine.complete(job_for(engine, "hello", model="law", max_new_tokens=1))
    assert engine.counts.completion_tokens - before < 100


def test_a_full_queue_turns_requests_away_and_gives_their_adapter_back(base_folder, adapters):
    limits = EngineLimits(batch=BatchLimits(max_waiting=2, max_rows=1))
    engine = Engine(str(base_folder), adapters, limits=limits)
    events, refused = [], 0
    for _ in range(12):
        try:
            engine.submit(job_for(engine, "x", model="law", max_new_tokens=40), events.append)
        except QueueFullError as error:
            refused += 1
            assert error.retry_after_s >= 1
    assert refused >= 8
    engine.close()
    ends = [event for event in events if isinstance(event, (Finished, Failed))]
    assert len(ends) == 12 - refused


def test_a_crash_of_the_model_fails_its_requests_only(base_folder):
    engine = Engine(str(base_folder))
    job = job_for(engine, "hello", model="tiny-chat", max_new_tokens=4)
    broken = engine.model.model.layers[0].mlp
    engine.model.model.layers[0].mlp = None
    with pytest.raises(MachineError, match="other requests"):
        engine.complete(job)
    engine.model.model.layers[0].mlp = broken
    assert engine.complete(job).num_completion_tokens
    engine.close()
    with pytest.raises(MachineError, match="closed"):
        engine.complete(job)


def test_many_loads_and_unloads_leave_nothing_in_the_model(engine, adapters):
    parameters = sum(1 for _ in engine.model.parameters())
    for _ in range(20):
        engine.load_adapter("x", adapters["law"])
        engine.unload_adapter("x")
    engine.complete(job_for(engine, "x", model="law", max_new_tokens=1))
    assert sum(1 for _ in engine.model.parameters()) == parameters


def test_a_missing_or_damaged_adapter_stops_the_start(base_folder, adapters, tmp_path):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(LorakeetError):
            Engine(str(base_folder), {"x": Path(folder)})
