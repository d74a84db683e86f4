"""Where a pass keeps its numbers: in an arena, apart from the memory that the model works in; and the way to the host.

A small array that stays allocated in a block that the model has just freed fragments the heap: the next large tensor no
longer fits there. A few kilobytes a site and sample then cost hundreds of megabytes (docs/benchmarks.md). So they are
written one after the other into memory maps of their own. Their pages are faulted in many at a time, for a page
fault at the first write costs as much as a small row's reduction.
"""

from __future__ import annotations

import math
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIZE = 1 << 26
"""The bytes of a map, more for an array that is larger; pages that were never faulted in take no memory."""
AHEAD = 1 << 17
"""Bytes that are faulted in at a time."""
POPULATE_WRITE = 23
"""`MADV_POPULATE_WRITE` of Linux 5.14 and later, which not every Python names."""


def own_pages(size: int) -> NDArray[np.uint8]:
    """Return zeros in pages of their own, which go back to the system with the last array that refers to them."""
    return np.zeros(size, dtype=np.uint8) if not size or not _maps() else np.frombuffer(_map(size), dtype=np.uint8)


def _maps() -> bool:
    return hasattr(mmap, "MAP_PRIVATE")


def _map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Arena:
    """The memory of one pass, taken in the order in which its rows come."""

    def __init__(self) -> None:
        self._maps: list[NDArray[np.uint8]] = []
        self._starts: list[int] = []
        self._map = np.zeros(0, dtype=np.uint8)
        self._start = 0
        self._used = 0
        self._ready = 0
        self._advise: Callable[[int, int, int], None] | None = None

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array of zeros."""
        values: NDArray[Any] = self.take(math.prod(shape) * np.dtype(dtype).itemsize)[1].view(dtype)
        return values.reshape(shape)

    def take(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        """Allocate `size` bytes of zeros; return their offset in the arena and the bytes."""
        begin = self._used
        if begin + size > self._ready:
            begin = self._prepare(size)
        # Aligned, so that a view of any dtype may begin at the next offset.
        self._used = (begin + size + 15) & ~15
        return self._start + begin, self._map[begin : begin + size]

    def at(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Return the bytes at an offset."""
        if not size:
            return np.zeros(0, dtype=np.uint8)
        index = bisect_right(self._starts, offset) - 1
        begin = offset - self._starts[index]
        return self._maps[index][begin : begin + size]

    def _prepare(self, size: int) -> int:
        """Fault in pages for `size` bytes; return their offset in the map."""
        if self._used + size > len(self._map):
            self._begin_map(-(-max(size, SIZE) // mmap.PAGESIZE) * mmap.PAGESIZE)
        wanted = min(len(self._map), -(-(self._used + size) // AHEAD) * AHEAD)
        if self._advise is not None:
            with suppress(OSError):  # an older kernel knows no such advice and faults pages in as they are written to
                self._advise(POPULATE_WRITE, self._ready, wanted - self._ready)
        self._ready = wanted
        return self._used

    def _begin_map(self, size: int) -> None:
        self._start += len(self._map)
        self._map = own_pages(size)
        self._used = self._ready = 0
        self._advise = getattr(getattr(self._map.base, "obj", None), "madvise", None)
        self._maps.append(self._map)
        self._starts.append(self._start)


class Column:
    """One array of each population: all of one dtype, of any length."""

    def __init__(self, arena: Arena, dtype: Any, shape: tuple[int, ...]) -> None:
        """Begin a column of arrays of a dtype whose shapes differ from this one in the first dimension only."""
        self._arena = arena
        self._dtype = np.dtype(dtype)
        self._shape = (-1, *shape[1:]) if shape else ()
        self._offsets, self._sizes = array("q"), array("q")

    def room(self, count: int) -> NDArray[Any]:
        """Allocate zeros for the next array, [count]."""
        size = count * self._dtype.itemsize
        offset, taken = self._arena.take(size)
        self._offsets.append(offset)
        self._sizes.append(size)
        return taken.view(self._dtype)

    def append(self, values: NDArray[Any]) -> None:
        """Copy a population's values."""
        self.room(values.size)[:] = values.ravel()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> NDArray[Any]:
        values: NDArray[Any] = self._arena.at(self._offsets[index], self._sizes[index]).view(self._dtype)
        return values.reshape(self._shape)


class Accumulator:
    """The numbers of one site so far. `rows`: name → an array of each population; `pooled`: name → a sum over all."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.rows: dict[str, Any] = {}
        self.pooled: dict[str, Any] = {}

    def room(self, name: str, count: int, dtype: Any, shape: tuple[int, ...] = (0,)) -> NDArray[Any]:
        """Allocate zeros [count] for the next population's array of that name; `shape`: see `Column`."""
        column = self.rows.get(name)
        if column is None:
            column = self.rows[name] = Column(self.arena, dtype, shape)
        room: NDArray[Any] = column.room(count)
        return room

    def add(self, name: str, values: NDArray[Any]) -> None:
        """Copy the next population's array of that name."""
        self.room(name, values.size, values.dtype, values.shape)[:] = values.ravel()

    def take(self, name: str, value: Any) -> None:
        """Keep the next population's tensor of that name: a copy of one on the CPU, one on an accelerator itself."""
        if value.device.type == "cpu":
            self.add(name, value.numpy())
        else:
            self.hold(name, value)

    def hold(self, name: str, value: Any) -> None:
        """Keep the next population's tensor itself: its values may be computed later."""
        self.rows.setdefault(name, []).append(value)

    def add_up(self, name: str, value: Tensor) -> None:
        """Add a tensor to the sum of that name."""
        before = self.pooled.get(name)
        self.pooled[name] = value.clone() if before is None else before.add_(value)

    def widen(self, name: str, ends: Tensor) -> None:
        """Widen the `EXTREME_NAMES` of that name, [4, …], by those of the next population."""
        before = self.pooled.get(name)
        self.pooled[name] = ends if before is None else widened(before, ends)


def widened(before: Tensor, ends: Tensor) -> Tensor:
    """Return `EXTREME_NAMES`, [4, …], of two tensors from those of each."""
    largest, least = torch.maximum(before, ends), torch.minimum(before, ends)
    return torch.stack([largest[0], least[1], least[2], largest[3]])


AT_ONCE = 1 << 28
"""About how many bytes are copied together; joining them takes as many on the device."""


class Transfer:
    """Tensors copied to the host together, since each copy waits for the device. Any other is copied when asked for."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._arrays: dict[int, tuple[Tensor, NDArray[Any]]] = {}
        for group in _groups(tensors):
            self._copy(group)

    def _copy(self, group: list[Tensor]) -> None:
        joint = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in group]).cpu().numpy()
        begin = 0
        for tensor in group:
            values = np.empty(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
            values.ravel().view(np.uint8)[:] = joint[begin : begin + tensor.nbytes]
            begin += tensor.nbytes
            self._arrays[id(tensor)] = tensor, values

    def __call__(self, value: Tensor | NDArray[Any]) -> NDArray[Any]:
        """Return the values of a tensor; an array as it is."""
        if not isinstance(value, Tensor):
            return np.asarray(value)
        known = self._arrays.get(id(value))
        return known[1] if known else value.cpu().numpy()


def _groups(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield those that are on a device, by device, in groups of about `AT_ONCE` bytes."""
    waiting: dict[torch.device, list[Tensor]] = {}
    sizes: dict[torch.device, int] = {}
    for tensor in tensors:
        device = tensor.device
        if device.type == "cpu" or not tensor.numel():
            continue
        waiting.setdefault(device, []).append(tensor)
        sizes[device] = sizes.get(device, 0) + tensor.nbytes
        if sizes[device] > AT_ONCE:
            yield waiting.pop(device)
            sizes[device] = 0
    yield from waiting.values()
