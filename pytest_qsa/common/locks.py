"""Locks between processes. Whoever waits for one is told for whom, and gives up when the holder shows no sign of life.

The system's lock of a file (`flock`) is released when its process ends, however it ends. Where a file system has none,
the file itself is the lock: it is made exclusively, and removed at the end.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .errors import InfraError, shown_path
from .progress import phase
from .text import logger, visible

UNFINISHED = ".qsa-tmp"
"""The suffix of a file on its way: one that is being written, or removed."""
HEARTBEAT = 10.0
"""Seconds between two writes of a held lock's file."""
LOCK_TIMEOUT = 120.0
"""Seconds without a heartbeat after which whoever waits gives up."""
TELL_AFTER = 1.0
"""Seconds of a wait before it is told: most locks are held for a moment."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a holder without a heartbeat, in seconds, and who is told of a wait."""

    seconds: float = LOCK_TIMEOUT
    tell: Callable[[str], None] = logger.info


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says."""

    pid: int
    host: str
    since: str
    work: str

    @classmethod
    def read(cls, file: Path) -> Holder | None:
        """Read the file of a lock; None where it is empty or gone, or says something else."""
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(int(content["pid"]), *(visible(str(content[key])) for key in ("host", "since", "work")))
        return None

    @property
    def ended(self) -> bool:
        """Whether it is a process of this machine that has ended."""
        import psutil  # where there is no flock alone

        return self.host == socket.gethostname() and not psutil.pid_exists(self.pid)

    def __str__(self) -> str:
        """Write who it is, for the end of a sentence."""
        host = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"process {self.pid}{host}, which has worked on {self.work} since {self.since}"


@dataclass
class Lock:
    """A lock that this process holds: its file, open. A thread writes the heartbeat."""

    file: Path
    handle: int
    record: bytes

    def __post_init__(self) -> None:
        os.ftruncate(self.handle, 0)
        self._beat()
        self._released = threading.Event()
        threading.Thread(target=self._beat_on, name="qsa-heartbeat", daemon=True).start()

    def _beat(self) -> None:
        os.lseek(self.handle, 0, os.SEEK_SET)
        os.write(self.handle, self.record)

    def _beat_on(self) -> None:
        while not self._released.wait(HEARTBEAT):
            with suppress(OSError):  # the disk is full, or the lock was released just now
                self._beat()

    def release(self) -> None:
        """Remove the file, and let the next one have the lock."""
        self._released.set()
        # If someone has removed ours, the file is another process's.
        ours = _is_at(self.handle, self.file)
        if sys.platform == "win32":  # an open file can't be removed
            os.close(self.handle)
        with suppress(OSError):
            if ours:
                self.file.unlink()
        if sys.platform != "win32":
            os.close(self.handle)


def try_lock(file: Path, work: str) -> Lock | None:
    """Return the lock of a file; None while another process, or another part of this one, holds it.

    `work`: what it is held for, for those who wait.

    Raises:
        OSError: the file can't be made or written.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        handle, made = os.open(file, flags | os.O_EXCL, 0o644), True
    except FileExistsError:
        handle, made = os.open(file, flags, 0o644), False
    try:
        held = flocked(handle)
        if held is None:  # no flock here: the maker of the file holds the lock
            held = made
            if not made and (holder := Holder.read(file)) is not None and holder.ended:
                _remove_left(file, holder)
                return try_lock(file, work)
        # Its last holder may have removed the file after it was opened here.
        if held and _is_at(handle, file):
            now = datetime.now(UTC).strftime("%H:%M:%S UTC")
            content = {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "work": work}
            lock = Lock(file, handle, json.dumps(content).encode())
            handle = -1
            return lock
        return None
    except OSError:
        with suppress(OSError):
            if made:  # on a full disk: an empty file would be taken for a lock
                file.unlink()
        raise
    finally:
        if handle >= 0:
            os.close(handle)


@contextmanager
def locked(files: Sequence[Path], work: str, patience: Patience, hint: str = "") -> Iterator[Lock]:
    """Hold the lock of one of the files, the first that is free. `hint`: what is told beside a wait.

    Raises:
        OSError: a file can't be made or written.
        InfraError: no holder has given a sign of life for the time of `patience`.
    """
    lock = _waited_for(files, work, patience, hint)
    try:
        yield lock
    finally:
        lock.release()


def _waited_for(files: Sequence[Path], work: str, patience: Patience, hint: str) -> Lock:
    began = beaten = time.monotonic()
    signs: list[tuple[int, int] | None] = []
    told = ""
    while True:
        for file in files:
            if (lock := try_lock(file, work)) is not None:
                return lock
        now = time.monotonic()
        whom = "; ".join(str(holder) for holder in map(Holder.read, files) if holder) or "another process"
        # By our own clock, since a file last changed here: the clocks of two machines may differ by more.
        if signs != (signs := [_sign_of(file) for file in files]):
            beaten = now
        elif now - beaten > patience.seconds:
            raise InfraError(
                f"{work} waits for {whom}. It has given no sign of life for {patience.seconds:g} s: end it, or remove "
                f"{shown_path(files[0])} if there is no such process, or wait longer with --qsa-lock-timeout"
            )
        if now - began > TELL_AFTER and whom != told:
            patience.tell(visible(f"{work} waits for {whom}{hint}"))
            phase("waiting for another process")
            told = whom
        time.sleep(min(0.5, 0.02 + (now - began) / 10))


def flocked(handle: int) -> bool | None:
    """Take the system's lock of an open file; False where another has it, None where the file system has no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOSYS, ENOLCK or EOPNOTSUPP, and EACCES on some shares of other systems
        return None
    return True


def _is_at(handle: int, file: Path) -> bool:
    """Say whether an open file is still the one of that path."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), file.lstat())
    return False


def _sign_of(file: Path) -> tuple[int, int] | None:
    """Return what a heartbeat or another holder changes; None for a file that is gone."""
    with suppress(OSError):
        found = file.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _remove_left(file: Path, left: Holder) -> None:
    """Remove the lock file of a process that has ended."""
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}{UNFINISHED}")
    with suppress(OSError):
        file.rename(aside)
        if Holder.read(aside) != left:  # another process was faster, and this is its own lock
            os.link(aside, file)
    with suppress(OSError):
        aside.unlink()
