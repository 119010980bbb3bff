"""One writer at a time in a folder, also after a crash and across machines."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from hf_mim import lock
from hf_mim.lock import LOCK, LockedError, check_unlocked, locked

HOLDS = """
import sys, time
from hf_mim.lock import locked
with locked(sys.argv[1], "output_dir"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.5)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def elsewhere(folder, **changes):
    """The lock of a process on another machine."""
    (folder / LOCK).write_text(json.dumps(lock._about_this_process() | {"host": "node7", "process": 99} | changes))
    return folder / LOCK


def test_a_second_process_is_refused_in_one_line_that_names_the_first(tmp_path, holder):
    with pytest.raises(LockedError, match=rf"output_dir .* is in use by process {holder.pid} on ") as error:
        with locked(tmp_path, "output_dir"):
            pass
    assert "\n" not in str(error.value)
    with pytest.raises(LockedError):
        check_unlocked(tmp_path, "output_dir")


def test_a_killed_owner_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    check_unlocked(tmp_path, "output_dir")
    with locked(tmp_path, "output_dir"):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path):
    elsewhere(tmp_path, host=lock._about_this_process()["host"], process=os.getppid(), started=0)
    with locked(tmp_path, "output_dir"):
        pass


def test_the_owner_itself_may_look(tmp_path):
    with locked(tmp_path, "output_dir"):
        check_unlocked(tmp_path, "output_dir")


def test_a_block_within_a_block_takes_nothing_away(tmp_path):
    with locked(tmp_path, "output_dir"):
        before = lock._state(tmp_path / LOCK)
        with locked(tmp_path, "checkpoint"):
            assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        assert lock._state(tmp_path / LOCK) == before
    assert not list(tmp_path.iterdir())


def test_an_owner_on_another_machine_is_dead_if_its_lock_stays_as_it_is(tmp_path, quick):
    elsewhere(tmp_path)
    told = []
    with locked(tmp_path, "output_dir", told.append):
        pass
    assert len(told) == 1 and "process 99 on node7" in told[0]


def test_an_owner_on_another_machine_lives_if_its_lock_changes(tmp_path, quick):
    path = elsewhere(tmp_path)
    over = threading.Event()

    def touch():
        while not over.wait(0.05):
            os.utime(path)

    beat = threading.Thread(target=touch)
    beat.start()
    try:
        with pytest.raises(LockedError, match="process 99 on node7"), locked(tmp_path, "output_dir", lambda line: None):
            pass
    finally:
        over.set()
        beat.join()


def test_the_owner_touches_its_lock(tmp_path, quick):
    with locked(tmp_path, "output_dir"):
        first = lock._state(tmp_path / LOCK)
        end = time.monotonic() + 10
        while lock._state(tmp_path / LOCK) == first and time.monotonic() < end:
            time.sleep(0.02)
        assert lock._state(tmp_path / LOCK) != first


def test_a_lock_that_was_taken_away_is_told_and_left_to_its_new_owner(tmp_path, quick, caplog):
    with locked(tmp_path, "output_dir"):
        path = elsewhere(tmp_path)
        end = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < end:
            time.sleep(0.02)
    assert "two may write" in caplog.text
    assert json.loads(path.read_text())["host"] == "node7"


def test_the_lock_of_a_new_owner_is_not_removed_for_that_of_a_dead_one(tmp_path):
    dead = {"process": 1}
    path = elsewhere(tmp_path)
    lock._remove(path, dead)
    assert json.loads(path.read_text())["process"] == 99


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_lock_is_that_of_an_unknown_owner(tmp_path, quick, content):
    (tmp_path / LOCK).write_text(content)
    with locked(tmp_path, "output_dir", lambda line: None):
        pass


def test_a_file_system_without_hard_links_has_locks_too(tmp_path, monkeypatch):
    def link(*args):
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    with locked(tmp_path, "output_dir"):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
