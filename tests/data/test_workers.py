"""Work in other processes: the same results in the same order, and no death goes unnoticed."""

import json
import os
import time
from functools import partial

import pytest

from lorakeet.base.errors import DataError, MachineError
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.data import prepare, workers
from lorakeet.data.workers import PIECES_HERE, PIECES_WAITING, map_pieces


def work_with(home: int, piece: str) -> str:
    """Slow where it started, so that pieces are left for the workers."""
    if os.getpid() == home:
        time.sleep(0.02)
    return piece.upper() + ("" if os.getpid() == home else " elsewhere")


class ReadyWorker(workers._Worker):
    """Waited for, so that it gets pieces of a short stream too."""

    num_sent = 0

    def __init__(self, work) -> None:
        super().__init__(work)
        self.is_ready = self._hear() == "ready"

    def send(self, piece) -> None:
        ReadyWorker.num_sent += 1
        super().send(piece)


def fail_at_20(home: int, piece: str) -> str:
    """Slow elsewhere, so that the first process meets the error while older pieces are out."""
    if os.getpid() != home:
        time.sleep(0.2)
    if piece == "20":
        raise DataError("row 20 is wrong")
    return piece


def raise_elsewhere(home: int, piece: str) -> str:
    if os.getpid() != home:
        raise DataError(f"row {piece} is wrong")
    return work_with(home, piece)


def die_elsewhere(home: int, piece: str) -> str:
    if os.getpid() != home:
        os._exit(1)
    return work_with(home, piece)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_large_pieces_come_back_in_order(num_workers, monkeypatch):
    monkeypatch.setattr(workers, "_Worker", ReadyWorker)
    pieces = [f"piece {number} " * 20_000 for number in range(200)]
    found = list(map_pieces(partial(work_with, os.getpid()), iter(pieces), num_workers))
    assert [piece for piece, _ in found] == pieces
    results = [result.removesuffix(" elsewhere") for _, result in found]
    assert results == [piece.upper() for piece in pieces]
    assert any(len(a) != len(b) for a, (_, b) in zip(results, found, strict=True)) == (
        num_workers > 0
    )


def test_no_process_starts_for_a_few_pieces(monkeypatch):
    monkeypatch.setattr(workers, "_Worker", None)
    pieces = [str(number) for number in range(PIECES_HERE)]
    assert [done for _, done in map_pieces(str.upper, pieces, 2)] == pieces


def test_a_stream_ends_before_a_worker_is_ready():
    pieces = [str(number) for number in range(PIECES_HERE + 2)]
    assert [done for _, done in map_pieces(str.upper, pieces, 2)] == pieces


def test_a_stream_is_read_no_further_than_the_workers_are():
    read = []
    pieces = (read.append(number) or str(number) for number in range(200))
    for number, _ in enumerate(map_pieces(partial(work_with, os.getpid()), pieces, 2), start=1):
        assert len(read) - number <= 2 * PIECES_WAITING + 2


def test_an_error_waits_for_the_pieces_before_it(monkeypatch):
    monkeypatch.setattr(workers, "_Worker", ReadyWorker)
    pieces, seen = [str(number) for number in range(40)], []
    with pytest.raises(DataError, match="row 20 is wrong"):
        for piece, _ in map_pieces(partial(fail_at_20, os.getpid()), pieces, 2):
            seen.append(piece)
    assert seen == pieces[:20]


def test_errors_arrive_and_a_dead_worker_is_told_of(monkeypatch):
    monkeypatch.setattr(workers, "_Worker", ReadyWorker)
    pieces = [str(number) for number in range(40)]
    with pytest.raises(DataError, match=r"row \d+ is wrong"):
        list(map_pieces(partial(raise_elsewhere, os.getpid()), pieces, 1))
    with pytest.raises(MachineError, match=r"data\.workers: 0"):
        list(map_pieces(partial(die_elsewhere, os.getpid()), pieces, 1))


def test_shards_do_not_depend_on_the_number_of_workers(
    tmp_path, chat_tokenizer_folder, monkeypatch
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer_folder)
    monkeypatch.setattr(prepare, "_ROWS_OF_A_CHUNK", 4)
    monkeypatch.setattr(workers, "_Worker", ReadyWorker)
    answer = "Mail a@b.org, call 13812345678"
    rows = [json.dumps({"instruction": f"Ask {n}", "output": answer}) for n in range(160)]
    rows[5], rows[80], rows[-1] = "{broken", '{"foo": 1}', "{tail"
    rows[90] = json.dumps({"instruction": "long", "output": "word " * 200})
    rows[20] = rows[91] = rows[3]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    found = []
    for number in (0, 1, 3):
        recipe = recipe_from_dict({
            "base": "b",
            "data": {"train": str(path), "validation": 0.2, "max_tokens": 100, "workers": number},
        })  # fmt: skip
        folder = tmp_path / str(number)
        prepared = prepare.prepare_data(recipe, tokenizer, folder, lambda *a, **k: None)
        found.append(
            {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        )
        told = [json.loads(line) for line in (folder / "dropped.jsonl").open()]
        assert [row["line"] for row in told] == [6, 21, 81, 91, 92, 160]
        assert len(prepared.train) + len(prepared.validation) == 160 - len(told)
    assert found[0] == found[1] == found[2]
    assert ReadyWorker.num_sent > 20
