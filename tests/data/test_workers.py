"""Work in other processes: the same results in the same order, and no death goes unnoticed."""

import json
import os
from functools import partial

import pytest

from lorakeet.base.errors import DataError, MachineError
from lorakeet.base.recipe_file import recipe_from_dict
from lorakeet.data import prepare, workers
from lorakeet.data.workers import PIECES_HERE, map_pieces


def raise_elsewhere(home: int, piece: str) -> str:
    if os.getpid() != home and piece == "37":
        raise DataError("row 37 is wrong")
    return piece


def die_elsewhere(home: int, piece: str) -> str:
    if os.getpid() != home:
        os._exit(1)
    return piece


@pytest.mark.parametrize("num_workers", [0, 2])
def test_large_pieces_come_back_in_order(num_workers):
    pieces = [f"piece {number} " * 20_000 for number in range(PIECES_HERE + 9)]
    found = list(map_pieces(str.upper, iter(pieces), num_workers))
    assert found == [(piece, piece.upper()) for piece in pieces]


def test_no_process_starts_for_a_few_pieces(monkeypatch):
    monkeypatch.setattr(workers, "_Worker", None)
    pieces = [str(number) for number in range(PIECES_HERE)]
    assert [done for _, done in map_pieces(str.upper, pieces, 2)] == pieces


def test_errors_arrive_and_a_dead_worker_is_told_of():
    pieces = [str(number) for number in range(40)]
    with pytest.raises(DataError, match="row 37 is wrong"):
        list(map_pieces(partial(raise_elsewhere, os.getpid()), pieces, 1))
    with pytest.raises(MachineError, match=r"data\.workers: 0"):
        list(map_pieces(partial(die_elsewhere, os.getpid()), pieces, 1))


def test_shards_do_not_depend_on_the_number_of_workers(
    tmp_path, chat_tokenizer_folder, monkeypatch
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer_folder)
    monkeypatch.setattr(prepare, "_ROWS_OF_A_CHUNK", 4)
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
