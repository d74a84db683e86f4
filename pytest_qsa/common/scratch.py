"""Folders for what is needed only while a run lasts; after a kill, the next run of the same user removes them."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from filelock import FileLock, Timeout


class Scratch(TemporaryDirectory[str]):
    """A temporary folder, `PREFIX-…`, that no run leaves behind for good.

    Beside it lies a lock that its owner holds from before there is the folder until there is none. The system lets go
    of it with the process, however that ends; what has no such lock is nobody's of ours and stays.
    """

    def __init__(self, prefix: str) -> None:
        home = Path(gettempdir())
        _remove_orphans(home, prefix)
        self._file = home / f"{prefix}-{secrets.token_hex(4)}.lock"
        self._lock = FileLock(self._file, thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except (OSError, NotImplementedError):  # a file system without locks: nobody may take it for an orphan
            self._file.unlink(missing_ok=True)
        super().__init__(prefix=f"{self._file.stem}-", dir=home)

    def cleanup(self) -> None:
        """Remove the folder, then the lock."""
        super().cleanup()
        self._lock.release()
        self._file.unlink(missing_ok=True)


def _remove_orphans(home: Path, prefix: str) -> None:
    """Remove the folders of this user whose owner is gone."""
    for file in home.glob(f"{prefix}-*.lock"):
        with suppress(OSError, NotImplementedError, Timeout):
            if _is_own_file(file):
                with FileLock(file, timeout=0, thread_local=False):
                    for folder in home.glob(f"{file.stem}-*"):
                        shutil.rmtree(folder, ignore_errors=True)
                    file.unlink(missing_ok=True)


def _is_own_file(file: Path) -> bool:
    """Say whether it is a file of this user: what others put into a shared folder may lead anywhere."""
    found = file.lstat()
    return stat.S_ISREG(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())
