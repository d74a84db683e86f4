"""Captures that outlive a run: the cache, and the partial sums of a pass that was interrupted.

The cache has a file for each fingerprint, checksummed, locked, in a folder of bounded size.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..common import InfraError, Patience, QsaWarning, locked, logger, remove_unfinished, write_atomically
from .capture import Capture
from .requests import Request, merge_requests

LIMIT = 4 << 30
"""The bytes that a cache folder may hold; the captures that were not used for longest go first."""
EVERY = 60.0
"""Seconds between two writes of partial sums."""


@dataclass
class PartialSums:
    """The file of one unfinished capture. Its name must be a hash of all that could change a number."""

    file: Path
    every: float = EVERY
    _written: float = field(default_factory=time.monotonic)

    def load(self, requests: Sequence[Request]) -> Capture | None:
        """Return the capture of the first samples, if it was made for the same plan and is whole."""
        try:
            capture = Capture.from_bytes(self.file.read_bytes())
        except (OSError, InfraError):
            return None
        return capture if capture.plan == merge_requests(requests) else None

    def keep(self, make: Callable[[], Capture]) -> None:
        """Write the capture so far, at most every `EVERY` seconds; on a full disk nothing is written."""
        if time.monotonic() - self._written < self.every:
            return
        content = make().to_parts()
        try:
            write_atomically(self.file, content)
        except OSError:
            self.every = float("inf")  # a full disk stays full: don't try again
        self._written = time.monotonic()

    def discard(self) -> None:
        """Remove the file: the capture is complete."""
        self.file.unlink(missing_ok=True)


Make = Callable[[Sequence[Request], PartialSums | None], Capture]
"""Makes a capture of what is requested; with the sums of an earlier pass that was stopped, it goes on from there."""


@dataclass(frozen=True)
class CaptureCache:
    """A folder of captures of earlier runs. A damaged one is made anew; a folder that can't be written is only read."""

    folder: Path
    limit: int = LIMIT
    patience: Patience = field(default_factory=Patience)

    def get_or_make(
        self,
        fingerprint: str,
        requests: Sequence[Request],
        make: Make,
        work: str = "a capture",
    ) -> Capture:
        """Return a capture that covers the requests; its lock lets one process make it at a time.

        A capture that exists but lacks something is made again for all that was ever asked of it and what is asked now.
        `work`: what the lock is held for, for those who wait.

        Raises:
            InfraError: another process makes it, and gives no sign of life.
        """
        file = self.folder / f"{fingerprint}.qsa"
        with ExitStack() as exits:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                exits.enter_context(locked([file.with_suffix(".lock")], work, self.patience))
            except OSError as error:
                return self._without_lock(file, requests, make, error)
            remove_unfinished(self.folder)
            found = self._found(file, requests)
            if found is not None and found.covers(requests):
                with suppress(OSError):
                    file.touch()  # pruning goes by the time of the last use
                return found
            sums = PartialSums(self.folder / f"{fingerprint}.partial")
            # For what was asked earlier too, else two suites in turn would replace each other's capture for
            # ever.
            capture = make(merge_requests([*requests, *(found.plan if found else ())]), sums)
            self._save(capture, file)
            return capture

    def _without_lock(
        self,
        file: Path,
        requests: Sequence[Request],
        make: Make,
        error: OSError,
    ) -> Capture:
        """Return what a folder holds that can't be written, else make it and keep nothing. Files are replaced whole."""
        found = self._found(file, requests)
        if found is not None and found.covers(requests):
            return found
        self._warn(f"can't be used ({error}); the capture is not kept")
        return make(requests, None)

    def _found(self, file: Path, requests: Sequence[Request]) -> Capture | None:
        """Return the capture of a file; None where there is none, or a damaged one."""
        found = self._load(file)
        if found is not None and found.covers(requests):
            logger.debug("the cached capture %s answers everything", file.name)
        else:
            lacking = "there is no such capture" if found is None else "it lacks something that is asked for now"
            logger.debug("the cached capture %s can't be used: %s", file.name, lacking)
        return found

    def _load(self, file: Path) -> Capture | None:
        if not file.exists():
            return None
        try:
            return Capture.from_bytes(file.read_bytes())
        except (OSError, InfraError) as error:
            self._warn(f"holds a damaged capture ({error}), which is made anew")
            return None

    def _save(self, capture: Capture, file: Path) -> None:
        try:
            write_atomically(file, capture.to_parts())
            self._prune(keep=file)
        except OSError as error:
            self._warn(f"can't be written ({error}); the capture is not kept")

    def _prune(self, keep: Path) -> None:
        held: list[tuple[float, int, Path]] = []
        for file in [*self.folder.glob("*.qsa"), *self.folder.glob("*.partial")]:
            with suppress(OSError):  # another process has pruned it
                found = file.stat()
                held.append((found.st_mtime, found.st_size, file))
        total = 0
        for _, size, file in sorted(held, reverse=True):
            total += size
            # Even if it alone is above the limit, because no later run would find it otherwise.
            if total > self.limit and file != keep:
                file.unlink(missing_ok=True)
                file.with_suffix(".sha256").unlink(missing_ok=True)  # of an earlier version

    def _warn(self, text: str) -> None:
        warnings.warn(QsaWarning(f"the cache {self.folder} {text}"), stacklevel=3)
