"""What a streamed model has on disk: its weights in their files, and the hidden states of waiting samples.

safetensors maps a whole file into memory; what is read through such a map stays resident until the file is closed. A
streamed model must not hold more than it computes with, so each weight has a map of its own, which ends with it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakSet

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from ...checkpoint import Tensor, tensors_of
from ...common import AnomalyError, InfraError, Scratch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

MAPPED_FROM = 1 << 20
"""The bytes from which on a weight is mapped: a smaller one is read sooner than mapped."""

MOST_MAPS = 256
"""The most weights that are mapped at once: each map keeps a descriptor, of which a process may have 1024."""

ALIGNED = 8
"""What the address of a mapped weight is a multiple of, so that every dtype may lie there."""

POPULATE_READ = 22
"""Linux' MADV_POPULATE_READ: read the pages now; what can't be read is an error, where a later access is a crash."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a parameter lies. Equal places are one tensor: tied weights share theirs."""

    file: str
    name: str


@dataclass
class Shards:
    """The files of a checkpoint. `index`: parameter → its file, its name there and the dtype that it is wanted in."""

    index: Mapping[str, Mapping[str, str]]
    bytes_read: int = 0
    _tables: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _maps: WeakSet[mmap.mmap] = field(default_factory=WeakSet)

    def __contains__(self, key: str) -> bool:
        return key in self.index

    def locate(self, key: str) -> StoredTensor:
        """Return where a parameter lies."""
        entry = self.index[key]
        return StoredTensor(entry["safetensors_file"], entry.get("weight_name", key))

    def read(self, key: str, shape: Sequence[int]) -> torch.Tensor:
        """Read a parameter, in the dtype that the model wants.

        Raises:
            AnomalyError: the file is cut short, or holds no such tensor, or one of another shape.
            InfraError: the file is missing, or its dtype isn't known to torch.
        """
        stored = self._entry(self.locate(key))
        if stored.shape != tuple(shape):
            raise AnomalyError(
                f"{stored.path}: {stored.name} is {list(stored.shape)}, the model's is {list(shape)}: "
                "not its checkpoint"
            )
        if stored.dtype not in DTYPES:
            raise InfraError(f"{stored.path}: {stored.name} is of the type {stored.dtype}, which torch doesn't know")
        content = self._bytes(stored)
        self.bytes_read += content.size
        tensor = torch.from_numpy(content).view(DTYPES[stored.dtype]).reshape(stored.shape)
        wanted = self.index[key].get("dtype")
        return tensor.to(getattr(torch, wanted)) if wanted else tensor

    def _bytes(self, stored: Tensor) -> NDArray[np.uint8]:
        # A copy of the weights would take a processor's time from the block that computes meanwhile.
        size = stored.stop - stored.start
        if size >= MAPPED_FROM and stored.start % ALIGNED == 0 and len(self._maps) < MOST_MAPS:
            begin = stored.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            pages = _mapped(stored.path, begin, stored.stop)
            if pages is not None:
                self._maps.add(pages)
                return np.frombuffer(pages, np.uint8, offset=stored.start - begin)
        content = np.fromfile(stored.path, dtype=np.uint8, count=size, offset=stored.start)
        if content.size < size:
            raise AnomalyError(f"{stored.path} is cut short: {stored.name} ends at byte {stored.stop:,}")
        return content

    def _entry(self, stored: StoredTensor) -> Tensor:
        # The header of a shard is read once for all its tensors.
        if stored.file not in self._tables:
            self._tables[stored.file] = {tensor.name: tensor for tensor in tensors_of(Path(stored.file))}
        if stored.name not in self._tables[stored.file]:
            raise AnomalyError(f"{stored.file} holds no tensor {stored.name}")
        return self._tables[stored.file][stored.name]


def _mapped(path: Path, begin: int, stop: int) -> mmap.mmap | None:
    """Map a part of a file and read it into memory; None where the system can't, or where the file can't be read."""
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), stop - begin, access=mmap.ACCESS_COPY, offset=begin)
        madvise = ctypes.CDLL(None).madvise  # mmap's own would stop all threads while it reads
    except (AttributeError, OSError, TypeError, ValueError):
        return None
    address = ctypes.c_void_p(np.frombuffer(pages, np.uint8).ctypes.data)
    return pages if madvise(address, ctypes.c_size_t(len(pages)), POPULATE_READ) == 0 else None


@dataclass
class Held:
    """A waiting hidden state. `file`: None while it's in memory; `key`: the address of its values."""

    hidden: torch.Tensor
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

    def hold(self, hidden: torch.Tensor | None) -> Held | None:
        """Hold the hidden state of a waiting sample; the ones that come last go to disk, for they are needed last.

        The tensor itself is emptied: other frames of the suspended forward refer to it, and would keep its memory.

        Raises:
            InfraError: there is no space for it.
        """
        # Memory that another waiting sample holds already is counted once.
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
        # At once, so that the disk holds no more than what still waits.
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


def _owned(hidden: torch.Tensor) -> bool:
    """Say whether nothing else shares a tensor's memory: a view of a weight or of another sample must stay as it is."""
    return not isinstance(hidden, torch.nn.Parameter) and hidden.untyped_storage().nbytes() == hidden.nbytes
