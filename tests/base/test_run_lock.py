"""One writer at a time, and the dead hold nothing."""

import subprocess
import sys
import threading

import pytest

from lorakeet.base.errors import MachineError, RequestError
from lorakeet.base.run_lock import hold_run, is_held

HOLDER = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from lorakeet.base.run_lock import hold_run\n"
    "with hold_run(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_told_who_the_first_is(other, tmp_path):
    assert is_held(tmp_path / "run")
    told = pytest.raises(RequestError, match=rf"process {other.pid} on .*--run")
    with told, hold_run(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_process_is_free(other, tmp_path):
    other.kill()
    other.wait()
    assert not is_held(tmp_path / "run")
    with hold_run(tmp_path / "run"):
        assert is_held(tmp_path / "run")
    assert not is_held(tmp_path / "run")


def test_two_threads_of_one_process_are_two_writers(tmp_path):
    refused = []

    def enter():
        try:
            with hold_run(tmp_path):
                pass
        except RequestError as error:
            refused.append(error)

    with hold_run(tmp_path):
        second = threading.Thread(target=enter)
        second.start()
        second.join()
    assert len(refused) == 1


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), hold_run(tmp_path):
        raise ZeroDivisionError
    with hold_run(tmp_path):
        pass


def test_a_place_that_is_no_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"), hold_run(tmp_path / "file"):
        pass


def test_a_folder_that_nobody_ever_wrote_is_not_held(tmp_path):
    assert not is_held(tmp_path)
