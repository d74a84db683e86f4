"""Files that are never half written, and temporary folders that no run leaves behind."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import AnomalyError, InfraError, shown_path
from .locks import UNFINISHED, flocked, try_lock

LONGEST_WRITE = 24 * 3600.0
"""Seconds after which a temporary file is taken for a killed write's, where the file system has no locks."""

MOST_TEXT = 1 << 30
"""The largest text that is read whole, in bytes."""
MOST_NESTED = 200
"""How deep the lists and objects of a JSON text may lie in one another: whoever walks through them takes some of
Python's 1,000 frames for each."""
SPARSE = 1_000_000_000
"""Bytes of a file above which it is looked at whether the disk holds them."""


def write_atomically(path: Path, content: bytes | str | Sequence[bytes | memoryview]) -> None:
    """Write to a temporary file in the same folder, then rename it; missing folders are made.

    A reader sees the old file or the new one, never a part of it. `content`: the whole, or its parts in order, so that
    a large file isn't joined in memory before.

    Raises:
        OSError: the folder can't be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    handle, temporary = _temporary(path)
    # The lock of a file is held until its last duplicate is closed: here until it has its name.
    lock = None if sys.platform == "win32" else os.dup(handle)
    try:
        with os.fdopen(handle, "wb") as file:
            whole = content.encode("utf-8") if isinstance(content, str) else content
            file.writelines([whole] if isinstance(whole, bytes) else whole)
        os.chmod(temporary, 0o644)  # mkstemp makes it readable for its owner alone
        os.replace(temporary, path)
    # Also at Ctrl-C, which is no Exception.
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _temporary(path: Path) -> tuple[int, str]:
    """Make a temporary file for the content of a file, and lock it, so that others know that it is being written."""
    while True:
        # In the same folder, because a rename is atomic only within one file system.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=UNFINISHED)
        # Between these two lines, another process may have taken it for a killed one's.
        if flocked(handle) is not False and os.path.exists(name):
            return handle, name
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of writes that were killed; those of writes that go on are locked."""
    for file in folder.glob(f".*{UNFINISHED}"):
        with suppress(OSError):
            handle = os.open(file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                old = time.time() - os.fstat(handle).st_mtime > LONGEST_WRITE
                if (locked := flocked(handle)) or (locked is None and old):
                    file.unlink()
            finally:
                os.close(handle)


def refuse_special(path: Path, most: int | None = None) -> None:
    """Refuse what would block or never end when it is read, and what has more than `most` bytes.

    Raises:
        InfraError: it is a FIFO, a socket or a device, or a link to one; or it is too large.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InfraError(f"{shown_path(path)}: is no regular file, so it isn't read")
    if most is not None and path.is_file() and (size := path.stat().st_size) > most:
        raise InfraError(
            f"{shown_path(path)}: has {size / 1e6:,.0f} MB, more than the {most / 1e6:,.0f} MB that are read"
        )


def mistaken_for(head: bytes) -> str:
    """Say what a file is by how it begins, and what to do, where it is none of a checkpoint's; empty where it may be.

    `head`: its first 8 bytes at least.
    """
    if not head:
        return "is empty: copy or download it again"
    if head.lstrip()[:8].lower().startswith((b"<!doctyp", b"<html", b"<?xml")):
        return "is a web page or a server's answer: sign in, and download it again"
    if head.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "begins with a byte order mark, which no loader takes: save it as UTF-8 without one"
    return ""


def parsed_json(text: str | bytes, constant: Callable[[str], float] | None = None) -> Any:
    """Parse JSON that anyone may have written. `constant`: makes a number of `NaN` and `Infinity`, which no JSON has.

    Raises:
        ValueError: it is no JSON, or nested more than `MOST_NESTED` deep.
    """
    deep = f"it is nested more than {MOST_NESTED} deep"
    try:
        parsed = json.loads(text, parse_constant=constant)
    except RecursionError:
        raise ValueError(deep) from None
    level = [parsed]
    for _ in range(MOST_NESTED):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return parsed
    raise ValueError(deep)


def refuse_sparse(path: Path) -> None:
    """Refuse a file of which the disk holds less than a hundredth: its holes read as zeros, for hours.

    Raises:
        AnomalyError: it is such a file.
    """
    found = path.stat()
    # Some network file systems count no blocks; a file that begins with data isn't all holes.
    held = getattr(found, "st_blocks", found.st_size) * 512
    if found.st_size > SPARSE and held < found.st_size // 100 and (held or not _holds_data(path)):
        raise AnomalyError(
            f"{shown_path(path)} is a sparse file, with {held:,} of its {found.st_size:,} bytes on the disk: copy or "
            "download it again"
        )


def _holds_data(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            return os.lseek(file.fileno(), 0, getattr(os, "SEEK_DATA", os.SEEK_SET)) >= 0
        except OSError:  # there is none up to its end
            return False


def read_json(path: Path, missing: str, *, lines: bool = False) -> object:
    """Read the JSON of another program; with `lines`, a list of one value a line. `missing`: what the file would be.

    Raises:
        InfraError: there is no such file, it can't be read, or it is no regular one.
        AnomalyError: it is no JSON.
    """
    refuse_special(path, MOST_TEXT)
    try:
        # utf-8-sig: results written on Windows may begin with a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
        return [parsed_json(line) for line in text.splitlines() if line.strip()] if lines else parsed_json(text)
    except FileNotFoundError:
        raise InfraError(f"{shown_path(path)}: there is no such file of {missing}") from None
    except OSError as error:
        raise InfraError(f"{shown_path(path)}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise AnomalyError(f"{shown_path(path)}: is no JSON: {str(error)[:120]}") from None


class Scratch(tempfile.TemporaryDirectory[str]):
    """A temporary folder, `PREFIX-…`. After a kill, the next run of the same user removes it.

    The owner holds a lock file beside the folder from before the folder is made until it is gone. The system releases
    the lock when the process ends, however it ends. A folder without such a lock file is not ours, so it stays.
    """

    def __init__(self, prefix: str) -> None:
        home = Path(tempfile.gettempdir())
        _remove_orphans(home, prefix)
        file = home / f"{prefix}-{secrets.token_hex(4)}.lock"
        self._lock = try_lock(file, prefix)
        super().__init__(prefix=f"{file.stem}-", dir=home)

    def cleanup(self) -> None:
        """Remove the folder, then the lock file."""
        super().cleanup()
        # After the folder: without its lock file, the rest of a half removed one would stay for ever.
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _remove_orphans(home: Path, prefix: str) -> None:
    """Remove the folders of this user whose owner is gone."""
    for file in home.glob(f"{prefix}-*.lock"):
        with suppress(OSError):
            # Whoever gets the lock at once knows that the process of its owner has ended.
            if _is_own_file(file) and (lock := try_lock(file, prefix)) is not None:
                for folder in home.glob(f"{file.stem}-*"):
                    shutil.rmtree(folder, ignore_errors=True)
                lock.release()


def _is_own_file(file: Path) -> bool:
    """Return whether it is a regular file of this user: in a shared folder, another user's link may lead anywhere."""
    found = file.lstat()
    return stat.S_ISREG(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())
