"""Hidden states of waiting samples that don't fit in memory: each is in a file of its own until its forward goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from ...common import InfraError, Scratch


@dataclass
class Held:
    """A waiting hidden state. `file`: None while it's in memory; `key`: the address of its values."""

    hidden: Tensor
    size: int
    key: int
    shape: torch.Size
    file: Path | None = None


class Spill:
    """Keeps at most `limit` bytes in memory (by default a quarter of what is free); the rest goes to a folder."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = psutil.virtual_memory().available // 4 if limit is None else limit
        self.in_memory = 0
        self.spilled_bytes = 0
        self._folder: Scratch | None = None
        self._waiting: set[int] = set()
        self._number = 0

    def hold(self, hidden: Tensor | None) -> Held | None:
        """Hold the hidden state of a waiting sample; the ones that come last go to disk, for they are needed last.

        The tensor itself is emptied: other frames of the suspended forward refer to it, and would keep its memory.

        Raises:
            InfraError: there is no space for it.
        """
        if hidden is None or not hidden.numel() or not _owned(hidden) or hidden.data_ptr() in self._waiting:
            return None
        held = Held(hidden, hidden.nbytes, hidden.data_ptr(), hidden.shape)
        if self.in_memory + held.size > self.limit:
            self._write(held)
        else:
            self.in_memory += held.size
            self._waiting.add(held.key)
        return held

    def bring_back(self, held: Held | None) -> None:
        """Put a hidden state back where the forward that goes on expects it."""
        if held is None:
            return
        if held.file is None:
            self.in_memory -= held.size
            self._waiting.discard(held.key)
            return
        content = torch.from_numpy(np.fromfile(held.file, dtype=np.uint8))
        held.hidden.data = content.view(held.hidden.dtype).reshape(held.shape).to(held.hidden.device)
        held.file.unlink()

    def close(self) -> None:
        """Remove the folder."""
        self.in_memory = 0
        self._waiting.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _write(self, held: Held) -> None:
        if self._folder is None:
            self._folder = Scratch("qsa-hidden")
        self._number += 1
        held.file = Path(self._folder.name) / str(self._number)
        try:
            # not numpy's tofile, which raises nothing when the disk is full
            held.file.write_bytes(held.hidden.cpu().contiguous().view(torch.uint8).numpy().data)
        except OSError as error:
            raise InfraError(
                f"the hidden states of the waiting samples don't fit in {self._folder.name}: "
                f"{error.strerror or error}; set TMPDIR to a larger disk or lower data.num_samples"
            ) from None
        self.spilled_bytes += held.size
        held.hidden.data = held.hidden.new_empty(0)


def _owned(hidden: Tensor) -> bool:
    """Say whether nothing else shares a tensor's memory: a view of a weight or of another sample must stay as it is."""
    return not isinstance(hidden, torch.nn.Parameter) and hidden.untyped_storage().nbytes() == hidden.nbytes
