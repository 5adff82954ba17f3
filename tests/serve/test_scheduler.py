import random
from dataclasses import dataclass

import pytest

from lorakeet.serve.scheduler import BatchLimits, QueueFullError, Scheduler


@dataclass(eq=False)
class Asked:
    name: str
    group: object
    num_prompt_tokens: int = 10
    max_new_tokens: int = 10
    is_cancelled: bool = False


def names_of(batch):
    return [request.name for request in batch]


def submit_all(scheduler, requests):
    for request in requests:
        scheduler.submit(request)


def drain(scheduler):
    batches = []
    while batch := scheduler.take_batch():
        batches.append(batch)
    return batches


def test_the_oldest_leads_and_its_group_joins_in_order():
    scheduler = Scheduler(BatchLimits())
    submit_all(scheduler, [Asked(name, name[0]) for name in ("a1", "b1", "a2", "c1", "a3")])
    assert [names_of(batch) for batch in drain(scheduler)] == [["a1", "a2", "a3"], ["b1"], ["c1"]]


def test_batches_keep_to_rows_and_padded_tokens():
    scheduler = Scheduler(BatchLimits(max_rows=3, max_tokens=100, max_waiting=100))
    submit_all(scheduler, [Asked(str(n), "g") for n in range(7)])
    assert [len(batch) for batch in drain(scheduler)] == [3, 3, 1]
    submit_all(scheduler, [Asked("short", "g"), Asked("long", "g", num_prompt_tokens=90)])
    assert [len(batch) for batch in drain(scheduler)] == [1, 1]


def test_a_full_queue_says_when_to_come_back():
    scheduler = Scheduler(BatchLimits(max_waiting=2))
    submit_all(scheduler, [Asked("a", "g"), Asked("b", "g")])
    with pytest.raises(QueueFullError) as caught:
        scheduler.submit(Asked("c", "g"), seconds_per_request=3)
    assert caught.value.retry_after_s == 6


def test_cancelled_requests_free_their_places_and_are_handed_back():
    scheduler = Scheduler(BatchLimits(max_waiting=1))
    left = Asked("a", "g")
    scheduler.submit(left)
    left.is_cancelled = True
    scheduler.submit(Asked("b", "g"))
    assert names_of(scheduler.take_cancelled()) == ["a"]
    assert names_of(scheduler.take_batch()) == ["b"]


def test_every_request_runs_once_and_none_waits_behind_later_ones_of_its_group():
    for seed in range(50):
        chance = random.Random(seed)
        scheduler = Scheduler(BatchLimits(max_waiting=1000, max_rows=chance.randint(1, 6)))
        asked = [Asked(str(n), chance.choice("abcd")) for n in range(60)]
        submit_all(scheduler, asked)
        order = [request for batch in drain(scheduler) for request in batch]
        assert sorted(names_of(order), key=int) == names_of(asked)
        for group in "abcd":
            numbers = [int(request.name) for request in order if request.group == group]
            assert numbers == sorted(numbers)
