"""What an interrupted pass leaves: the capture of its first samples, written every minute, read by the next run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common import InfraError, write_atomically
from .capture import Capture
from .requests import Request, merge_requests

EVERY = 60.0
"""Seconds between two writes."""
_DIGEST = 32


@dataclass
class PartialSums:
    """The file of one unfinished capture. Its name has to stand for all that could change a number."""

    file: Path
    every: float = EVERY
    _written: float = field(default_factory=time.monotonic)

    def load(self, requests: Sequence[Request]) -> Capture | None:
        """Return the capture of the first samples, if it was made for the same plan and is whole."""
        try:
            content = self.file.read_bytes()
            if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
                return None
            capture = Capture.from_bytes(content[:-_DIGEST])
        except (OSError, InfraError):
            return None
        return capture if capture.plan == merge_requests(requests) else None

    def keep(self, make: Callable[[], Capture]) -> None:
        """Write the capture so far, if the last time is long enough ago; on a full disk nothing is kept."""
        if time.monotonic() - self._written < self.every:
            return
        content = make().to_bytes()
        try:
            write_atomically(self.file, content + hashlib.sha256(content).digest())
        except OSError:
            self.every = float("inf")
        self._written = time.monotonic()

    def discard(self) -> None:
        """Remove the file: the capture is complete."""
        self.file.unlink(missing_ok=True)
