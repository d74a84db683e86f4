"""Where a pass keeps its numbers: apart from the memory that the model works in.

A number that stays, in a block that the model has just let go, keeps a tensor as large as that block from being put
there again. A few kilobytes a site and sample then cost hundreds of megabytes (docs/benchmarks.md).
"""

from __future__ import annotations

import math
import mmap
from array import array
from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST, LARGEST = 1 << 14, 1 << 24
"""The bytes of a store's first map, and of its largest; what has not been written to takes no memory."""
ROWS = 16
"""For so many rows a column takes room at a time."""


def bytes_apart(size: int) -> NDArray[np.uint8]:
    """Return zeros in pages of their own, which go back to the system with the last array that refers to them."""
    if not size or not hasattr(mmap, "MAP_PRIVATE"):
        return np.zeros(size, dtype=np.uint8)
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)


class Store:
    """The memory of one site, in maps that grow as it does."""

    def __init__(self) -> None:
        self._map = bytes_apart(0)
        self._used = 0
        self._next = FIRST

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array of zeros."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._used + size > len(self._map):
            self._map, self._used = bytes_apart(-(-max(size, self._next) // mmap.PAGESIZE) * mmap.PAGESIZE), 0
            self._next = min(2 * len(self._map), LARGEST)
        taken: NDArray[Any] = self._map[self._used : self._used + size].view(dtype).reshape(shape)
        self._used += -(-size // 16) * 16
        return taken


class Column:
    """What each population left under one name: arrays of one dtype, of any length, one after the other."""

    def __init__(self, store: Store, dtype: Any, shape: tuple[int, ...]) -> None:
        """Make room for arrays of a dtype, whose shapes are as this one but for the first dimension."""
        self._store = store
        self._dtype = dtype
        self._rest = shape[1:]
        self._scalars = not shape
        self._parts: list[NDArray[Any]] = []
        self._begins: list[int] = []
        self._ends = array("q")

    def append(self, values: NDArray[Any]) -> None:
        """Take a copy of a population's values."""
        begin = self._ends[-1] if self._ends else 0
        if not self._parts or begin - self._begins[-1] + values.size > len(self._parts[-1]):
            self._parts.append(self._store.zeros((ROWS * values.size,), self._dtype))
            self._begins.append(begin)
        start = begin - self._begins[-1]
        self._parts[-1][start : start + values.size] = values.ravel()
        self._ends.append(begin + values.size)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> NDArray[Any]:
        begin, end = self._ends[index - 1] if index else 0, self._ends[index]
        part = max(0, bisect_right(self._begins, begin) - 1)
        values = self._parts[part][begin - self._begins[part] : end - self._begins[part]]
        return values.reshape(() if self._scalars else (len(values) // math.prod(self._rest), *self._rest))
