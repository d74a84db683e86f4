"""Locks between processes: one holds it, the others are told for whom they wait, and none waits for ever."""

import json
import os
import signal
import socket
import threading
import time

import pytest

from pytest_qsa.common import InfraError, Patience, locked, locks
from pytest_qsa.common.locks import try_lock
from support.processes import forking


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(locks, "TELL_AFTER", 0)


@pytest.fixture(params=["flock", "exclusive file"])
def system(request, monkeypatch):
    """Run with the system's locks, and where the file system refuses them: EACCES, as some shares do."""
    if request.param == "exclusive file":

        def refused(handle, operation):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("fcntl.flock", refused)
    return request.param


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.lock"


def hold(file, ready):
    lock = try_lock(file, "llama")
    ready.set()
    time.sleep(60)
    lock.release()


@pytest.fixture
def holder(file):
    """Start another process that holds the lock."""
    context = forking()
    ready = context.Event()
    process = context.Process(target=hold, args=(file, ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def left(file, pid, host=None):
    """Leave the lock file of a process."""
    file.write_text(json.dumps({"pid": pid, "host": host or socket.gethostname(), "since": "1:00", "work": "llama"}))


def dead_pid():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_one_holds_it_and_nothing_is_left_of_it(file, system):
    first = try_lock(file, "one")
    assert try_lock(file, "two") is None
    first.release()
    second = try_lock(file, "two")
    assert json.loads(file.read_text())["work"] == "two"
    second.release()
    assert list(file.parent.iterdir()) == []


def test_of_several_files_the_first_free_one_is_taken(tmp_path, system):
    slots, patience = [tmp_path / name for name in "ab"], Patience()
    with locked(slots, "x", patience) as first, locked(slots, "y", patience) as second:
        assert [first.file, second.file] == slots


def test_who_waits_is_told_for_whom_and_gives_up_without_a_heartbeat(file, system):
    told = []
    own = try_lock(file, "llama")  # its next heartbeat is ten seconds away
    with pytest.raises(InfraError) as raised, locked([file], "int8", Patience(0.3, told.append), "; a hint"):
        pass
    whom = f"int8 waits for process {os.getpid()}, which has worked on llama since "
    assert len(told) == 1
    assert told[0].startswith(whom)
    assert told[0].endswith("UTC; a hint")
    assert str(raised.value).startswith(whom)
    assert "has given no sign of life for 0.3 s: end it" in str(raised.value)
    own.release()


def test_a_heartbeat_keeps_those_who_wait(file, system, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    own = try_lock(file, "llama")
    release = threading.Timer(0.8, own.release)
    release.start()
    with locked([file], "int8", Patience(0.4)):  # half the time that it is held
        release.join()


@pytest.mark.process
def test_a_killed_holder_lets_go_and_a_stopped_one_is_given_up(file, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(InfraError, match=f"process {holder.pid}, .* no sign of life"):
        locked([file], "x", Patience(0.2)).__enter__()
    os.kill(holder.pid, signal.SIGKILL)
    with locked([file], "x", Patience(20)):
        pass
    assert not file.exists()


def test_what_a_killed_process_leaves_is_no_lock(file, system):
    left(file, dead_pid())
    with locked([file], "x", Patience(0.5)):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("system", ["exclusive file"], indirect=True)
def test_the_file_of_another_machine_is_a_lock_until_someone_removes_it(file, system):
    left(file, dead_pid(), host="build-7")
    with pytest.raises(InfraError, match=r"on build-7, .* or remove .*a\.lock if there is no such process"):
        locked([file], "x", Patience(0.2)).__enter__()


def test_a_lock_file_of_other_content_says_no_one(file):
    own = try_lock(file, "x")
    for content in (b"", b"[1]", b'{"pid": "\xff"}', b"[" * 9999):
        file.write_bytes(content)
        told = []
        with pytest.raises(InfraError, match="x waits for another process"):
            locked([file], "x", Patience(0.1, told.append)).__enter__()
    own.release()


def test_the_lock_of_another_process_is_not_removed(file):
    own = try_lock(file, "x")
    file.unlink()
    other = try_lock(file, "y")
    own.release()
    assert file.exists()
    other.release()
    assert not file.exists()
