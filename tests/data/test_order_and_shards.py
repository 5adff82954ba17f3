"""No row is lost or seen twice, and what is written reads back."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.base.errors import DataError, FileFormatError, RequestError
from lorakeet.base.records import EncodedSample, Origin
from lorakeet.data.collate import collate
from lorakeet.data.order import StepOrder, split_micro_batches
from lorakeet.data.shards import ShardReader, write_shards


def sample(length, line=1, label=-1):
    ids = np.arange(line, line + length, dtype=np.int32)
    mask = np.ones(length, dtype=bool)
    mask[0] = False
    return EncodedSample(ids=ids, mask=mask, label=label, origin=Origin(path="f", line=line))


def order(sources, weights=None, **options):
    source_of = np.repeat(np.arange(len(sources)), sources)
    options = {"batch_size": 4, "seed": 3, "epochs": 2, **options}
    return StepOrder(source_of, weights or [None] * len(sources), **options)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_row_is_seen_once_an_epoch(num_rows, batch_size, seed):
    steps = order([num_rows], batch_size=batch_size, seed=seed, epochs=batch_size)
    seen = [row for step in range(1, steps.num_steps + 1) for row in steps.rows_of_step(step)]
    assert len(seen) == num_rows * batch_size
    for epoch in range(batch_size):
        assert sorted(seen[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_the_rows_of_a_step_depend_on_seed_and_step_alone():
    forward = order([30])
    rows = {step: forward.rows_of_step(step) for step in range(1, forward.num_steps + 1)}
    backward = order([30])
    assert all(backward.rows_of_step(step) == rows[step] for step in sorted(rows, reverse=True))
    assert order([30], seed=4).rows_of_step(1) != rows[1]
    first, second = (sum((rows[s] for s in r), []) for r in (range(1, 8), range(8, 15)))
    assert first != second


def test_weights_mix_sources_in_their_ratio_without_early_repeats():
    steps = order([90, 7], weights=[0.9, 0.1], batch_size=10, epochs=1)
    assert steps.rows_per_epoch == 100
    seen = Counter(row for s in range(1, 11) for row in steps.rows_of_step(s))
    assert all(seen[row] == 1 for row in range(90))
    assert sorted(seen[row] for row in range(90, 97)) == [1, 1, 1, 1, 2, 2, 2]


def test_a_weighted_source_without_rows_is_an_error():
    with pytest.raises(DataError, match="entry 2 has a weight and no usable row"):
        order([5, 0], weights=[1, 1])
    with pytest.raises(DataError, match="no rows to train on"):
        order([0])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 600))
@settings(max_examples=80, deadline=None)
def test_micro_batches_hold_every_row_once_and_fit(lengths, max_tokens):
    groups = split_micro_batches(lengths, max_tokens)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        area = len(group) * max(lengths[place] for place in group)
        assert area <= max_tokens or len(group) == 1


def test_shards_read_back_and_damage_is_noticed(tmp_path):
    rows = [(sample(3, line=1), 0), (sample(5, line=2, label=1), 1), (sample(1, line=9), 1)]
    index = write_shards(iter(rows), tmp_path / "train")
    assert (index.num_rows, index.num_tokens) == (3, 9)
    reader = ShardReader(tmp_path / "train")
    assert len(reader) == 3 and list(reader.lengths) == [3, 5, 1]
    assert list(reader.source_of) == [0, 1, 1]
    for number, (one, _) in enumerate(rows):
        back = reader[number]
        assert np.array_equal(back.ids, one.ids) and np.array_equal(back.mask, one.mask)
        assert (back.label, back.origin) == (one.label, one.origin)
    file = tmp_path / "train" / "mask.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match="mask.bin: not the bytes"):
        ShardReader(tmp_path / "train")
    write_shards(iter([]), tmp_path / "none")
    assert len(ShardReader(tmp_path / "none")) == 0


def test_a_batch_pads_on_the_right_and_must_have_a_target():
    batch = collate([sample(2), sample(4)], pad_id=77)
    assert batch.ids_BT.tolist() == [[1, 2, 77, 77], [1, 2, 3, 4]]
    assert batch.attention_BT.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.num_targets == 4
    with pytest.raises(RequestError, match="without any trained token"):
        collate([sample(1)], pad_id=0)


@pytest.mark.parametrize("name", ["ids.bin", "mask.bin", "lines.bin", "paths.json"])
def test_a_shard_with_one_flipped_bit_is_refused_by_name(name, tmp_path):
    rows = [EncodedSample(ids=np.arange(5, dtype=np.int32), mask=np.arange(5) > 2,
                          origin=Origin(path="a.jsonl", line=n)) for n in range(1, 4)]  # fmt: skip
    write_shards(((row, 0) for row in rows), tmp_path / "train")
    assert len(ShardReader(tmp_path / "train")) == 3
    content = bytearray((tmp_path / "train" / name).read_bytes())
    content[3] ^= 4
    (tmp_path / "train" / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=f"{name}: not the bytes|JSON"):
        ShardReader(tmp_path / "train")
