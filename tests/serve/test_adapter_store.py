import random
from pathlib import Path

import pytest

from lorakeet.base.errors import RequestError
from lorakeet.serve.adapter_store import (
    AdapterStore,
    AdapterVersion,
    ForbiddenPathError,
    UnknownModelError,
    find_folder_under,
)


def version_of(letter):
    return AdapterVersion(digest=letter * 64, folder=Path(letter))


def test_a_request_keeps_its_version_when_the_name_gets_another():
    store = AdapterStore(("base",))
    store.publish("law", version_of("a"))
    held = store.acquire("law")
    assert store.publish("law", version_of("b")) is None
    assert held == version_of("a") and store.acquire("law") == version_of("b")
    assert set(store.resident) == {"a" * 64, "b" * 64}
    assert store.release(held) == version_of("a")
    assert set(store.resident) == {"b" * 64}


def test_two_names_share_equal_content_and_it_stays_until_both_are_gone():
    store = AdapterStore(("base",))
    store.publish("one", version_of("a"))
    store.publish("two", version_of("a"))
    assert store.retire("one") is None
    assert store.retire("two") == version_of("a")
    assert not store.resident


def test_a_version_is_chosen_by_its_first_digits():
    store = AdapterStore(("base", "/models/base"))
    store.publish("law", version_of("a"))
    assert store.acquire("law@aaaaaa") == version_of("a")
    assert store.acquire("base") is None and store.acquire("/models/base") is None
    for wrong in ("law@bbbbbb", "law@a", "law@", "base@aaaaaa", "nothing"):
        with pytest.raises(UnknownModelError, match="Loaded are: base, law"):
            store.acquire(wrong)


HOSTILE = ["", "../x", "a/b", "-a", ".a", "a" * 65, "a b", "a\n", "é", "base", "a\0", "C:\\x"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_are_paths_or_the_base_are_refused(name):
    with pytest.raises(RequestError):
        AdapterStore(("base",)).publish(name, version_of("a"))


def test_nothing_leaks_over_random_schedules():
    for seed in range(30):
        chance = random.Random(seed)
        store, held, gone = AdapterStore(("base",)), [], set()
        for _ in range(300):
            name, act = chance.choice("xyz"), chance.random()
            if act < 0.3:
                version = version_of(chance.choice("abcdef"))
                gone.discard(version.digest)
                out = store.publish(name, version)
            elif act < 0.4:
                out = store.retire(name) if name in store.adapters else None
            elif act < 0.7 and name in store.adapters:
                held.append(store.acquire(name))
                out = None
            else:
                out = store.release(held.pop(chance.randrange(len(held)))) if held else None
            gone |= {out.digest} if out else set()
            needed = {v.digest for v in held} | {v.digest for v in store.adapters.values()}
            assert set(store.resident) == needed and not needed & gone


def test_a_path_is_found_only_under_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "law").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("x")
    assert find_folder_under(root, "law") == (root / "law").resolve()
    assert find_folder_under(root, str(root / "law")) == (root / "law").resolve()
    (root / "link").symlink_to(outside)
    (root / "mixed").mkdir()
    (root / "mixed" / "file").symlink_to(outside / "secret")
    for path in ("../outside", str(outside), "link", "mixed", "/etc", "law/../../outside"):
        with pytest.raises(ForbiddenPathError):
            find_folder_under(root, path)
    for path in ("nothing", "a\0b", "x" * 5000):
        with pytest.raises(RequestError):
            find_folder_under(root, path)
    with pytest.raises(ForbiddenPathError, match="--adapter-root"):
        find_folder_under(None, "law")
