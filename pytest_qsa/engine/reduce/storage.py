"""Where a pass keeps its numbers: in an arena, apart from the memory that the model works in; and the way to the host.

A small array that stays allocated in a block that the model has just freed fragments the heap: the next large tensor no
longer fits there. A few kilobytes a site and sample then cost hundreds of megabytes (docs/benchmarks.md). So they are
written one after the other into memory maps of their own. Their pages are faulted in many at a time, for a page
fault at the first write costs as much as a small row's reduction.

The CPU's kernels write a record of each row and a window of counts for each site. A record is one array of the
patterns' dtype, [maxima | peaks | channels]. The maxima are signless patterns, one a token that counts; the peaks
(which of them are the largest) and the channels of these are int32, which in an array of 16 bits take two elements each
and begin at an even one. A window holds counts of the bins that occur, and no others: a tensor uses some 3,000 of
32,768, which then stay in the cache.
"""

from __future__ import annotations

import math
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ...captures import Array, added, padded

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
        self._address = 0
        self._used = 0
        self._ready = 0
        self._advise: Callable[[int, int, int], None] | None = None

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Return an array of zeros."""
        values: Array = self.take(math.prod(shape) * np.dtype(dtype).itemsize)[1].view(dtype)
        return values.reshape(shape)

    def take(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        """Allocate `size` bytes of zeros; return their offset in the arena and the bytes."""
        offset, _ = self.reserve(size)
        begin = offset - self._start
        return offset, self._map[begin : begin + size]

    def reserve(self, size: int) -> tuple[int, int]:
        """Allocate `size` bytes of zeros; return their offset in the arena and their address."""
        begin = self._used
        if begin + size > self._ready:
            begin = self._prepare(size)
        # Aligned, so that a view of any dtype may begin at the next offset.
        self._used = (begin + size + 15) & ~15
        return self._start + begin, self._address + begin

    def at(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Return the bytes at an offset."""
        if not size:
            return np.zeros(0, dtype=np.uint8)
        index = bisect_right(self._starts, offset) - 1
        begin = offset - self._starts[index]
        return self._maps[index][begin : begin + size]

    def gather(self, offsets: Iterable[int], size: int) -> NDArray[np.uint8]:
        """Return a copy of `size` bytes, 1 or more, at each of some offsets, [n, size]."""
        # Slices of memory and one join: a view by numpy of each piece costs five times as much.
        maps, pieces = [each.data for each in self._maps], []
        for offset in offsets:
            index = bisect_right(self._starts, offset) - 1
            begin = offset - self._starts[index]
            pieces.append(maps[index][begin : begin + size])
        return np.frombuffer(bytearray().join(pieces), dtype=np.uint8).reshape(-1, size)

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
        self._address = self._map.ctypes.data
        self._used = self._ready = 0
        # np.frombuffer keeps the map as its base's `obj`; plain zeros have no map to advise on.
        self._advise = getattr(getattr(self._map.base, "obj", None), "madvise", None)
        self._maps.append(self._map)
        self._starts.append(self._start)


class Column:
    """One array of each population: all of one dtype, of any length."""

    def __init__(self, arena: Arena, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
        """Begin a column of arrays of a dtype whose shapes differ from this one in the first dimension only."""
        self._arena = arena
        self._dtype = np.dtype(dtype)
        self._shape = (-1, *shape[1:]) if shape else ()
        self._offsets, self._sizes = array("q"), array("q")

    def room(self, count: int) -> Array:
        """Allocate zeros for the next array, [count]."""
        size = count * self._dtype.itemsize
        offset, taken = self._arena.take(size)
        self._offsets.append(offset)
        self._sizes.append(size)
        return taken.view(self._dtype)

    def rooms(self, counts: Sequence[int]) -> Array:
        """Allocate zeros for the next arrays, `counts` elements each, one after the other: [Σ counts]."""
        sizes = [count * self._dtype.itemsize for count in counts]
        offset, taken = self._arena.take(sum(sizes))
        self._offsets.extend(accumulate(sizes[:-1], initial=offset))
        self._sizes.extend(sizes)
        return taken.view(self._dtype)

    def reserve(self, size: int) -> int:
        """Allocate `size` bytes for the next array, which a kernel fills; return their address."""
        offset, address = self._arena.reserve(size)
        self._offsets.append(offset)
        self._sizes.append(size)
        return address

    def append(self, values: Array) -> None:
        """Copy a population's values."""
        self.room(values.size)[:] = values.ravel()

    def table(self, order: Sequence[int]) -> Array | None:
        """Return a copy of the flat arrays of populations in an order, [n, size]; None where their sizes differ."""
        sizes = {*self._sizes}
        if len(sizes) != 1 or 0 in sizes:
            return None
        return self._arena.gather([self._offsets[index] for index in order], *sizes).view(self._dtype)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Array:
        values: Array = self._arena.at(self._offsets[index], self._sizes[index]).view(self._dtype)
        return values.reshape(self._shape)


class Accumulator:
    """The numbers of one site so far. `rows`: name → an array of each population; `pooled`: name → a sum over all.

    `ranges`: text of an `InRange` → the numbers of its tokens alone.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.rows: dict[str, Any] = {}
        self.pooled: dict[str, Any] = {}
        self.ranges: dict[str, Accumulator] = {}

    def of_range(self, text: str) -> Accumulator:
        """Return where the numbers of a range of tokens go."""
        if text not in self.ranges:
            self.ranges[text] = Accumulator(self.arena)
        return self.ranges[text]

    def room(self, name: str, count: int, dtype: DTypeLike, shape: tuple[int, ...] = (0,)) -> Array:
        """Allocate zeros [count] for the next population's array of that name; `shape`: see `Column`."""
        room: Array = self.column(name, dtype, shape).room(count)
        return room

    def rooms(self, name: str, counts: Sequence[int], dtype: DTypeLike) -> Array:
        """Allocate zeros [Σ counts] for the arrays of that name of the next populations."""
        return self.column(name, dtype, (0,)).rooms(counts)

    def column(self, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> Column:
        """Return the arrays of that name."""
        column: Column | None = self.rows.get(name)
        if column is None:
            column = self.rows[name] = Column(self.arena, dtype, shape)
        return column

    def add(self, name: str, values: Array) -> None:
        """Copy the next population's array of that name."""
        self.room(name, values.size, values.dtype, values.shape)[:] = values.ravel()

    def take(self, name: str, value: Tensor) -> None:
        """Keep the next population's tensor of that name: a copy of one on the CPU, one on an accelerator itself."""
        if value.device.type == "cpu":
            self.add(name, value.numpy())
        else:
            self.hold(name, value)

    def hold(self, name: str, value: Tensor) -> None:
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


BYTES_AT_ONCE = 1 << 28
"""About how many bytes are copied together; joining them takes as many on the device."""


class Transfer:
    """Tensors copied to the host together, since each copy waits for the device. Any other is copied when asked for."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._arrays: dict[int, tuple[Tensor, Array]] = {}
        for group in _groups(tensors):
            self._copy(group)

    def _copy(self, group: list[Tensor]) -> None:
        # As bytes, so that tensors of all dtypes go in one copy.
        joint = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in group]).cpu().numpy()
        begin = 0
        for tensor in group:
            # A copy: a slice of the joint bytes would keep all of them in memory.
            values = np.empty(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
            values.ravel().view(np.uint8)[:] = joint[begin : begin + tensor.nbytes]
            begin += tensor.nbytes
            # The tensor is kept as well, so that its id isn't given to another.
            self._arrays[id(tensor)] = tensor, values

    def __call__(self, value: Tensor | Array) -> Array:
        """Return the values of a tensor; an array as it is."""
        if not isinstance(value, Tensor):
            return np.asarray(value)
        known = self._arrays.get(id(value))
        return known[1] if known else value.cpu().numpy()


def _groups(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield those that are on a device, by device, in groups of about `BYTES_AT_ONCE` bytes."""
    waiting: dict[torch.device, list[Tensor]] = {}
    sizes: dict[torch.device, int] = {}
    for tensor in tensors:
        device = tensor.device
        if device.type == "cpu" or not tensor.numel():
            continue
        waiting.setdefault(device, []).append(tensor)
        sizes[device] = sizes.get(device, 0) + tensor.nbytes
        if sizes[device] > BYTES_AT_ONCE:
            yield waiting.pop(device)
            sizes[device] = 0
    yield from waiting.values()


Sparse = tuple[NDArray[np.uint16], NDArray[np.int64]]
"""Bins, ascending, and their counts."""
HALF = 1 << 15
"""The 16-bit patterns of one sign."""
PAGE = 256
"""A window begins and ends at a multiple of this, two octaves of bfloat16, with as much to spare, so that it seldom
grows."""
FULL = 1 << 32
"""How many elements overflow a 32-bit count: the counts are carried over before that."""

HELD, TOP, LEAST = 0, 1, 2
"""The indices of a window's marks."""


def floats_of(patterns: Array, dtype: str) -> NDArray[np.float32]:
    """Return the magnitudes that signless patterns stand for: uint32 of float32, uint16 of the others."""
    if dtype == "float32":
        return patterns.view(np.float32)
    if dtype == "float16":
        return patterns.view(np.float16).astype(np.float32)
    return (patterns.astype(np.uint32) << 16).view(np.float32)


@dataclass
class Window:
    """The counts of one site. Column 0 is zero itself, column 1 the bin `base`, which is 1 or more.

    `sums` [S, W] uint32: a line for |x|, or lines for +x and −x where `signs` count; no line where nothing is counted.
    `zeros`: allocates. `marks`: how many elements the sums hold, the largest and the smallest signless pattern; `low`,
    `high`: the ends of x, where signs count.
    """

    counts: bool
    signs: bool
    dtype: str
    zeros: Callable[[tuple[int, ...], Any], Array] = np.zeros
    base: int = 1
    low: np.float32 = field(default=np.float32("inf"))
    high: np.float32 = field(default=np.float32("-inf"))
    marks: NDArray[np.int64] = field(default_factory=lambda: np.array([0, 0, 0xFFFFFFFF], dtype=np.int64))
    _carried: list[list[Sparse]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = self._zeros(0)

    def _zeros(self, bins: int) -> NDArray[np.uint32]:
        lines = 2 if self.signs else int(self.counts)
        if not bins:
            return np.zeros((lines, int(lines > 0)), dtype=np.uint32)
        return self.zeros((lines, bins + 1 if lines else 0), np.uint32)

    def expect(self, count: int) -> None:
        """Carry the counts over if `count` more elements could overflow one; note how many the sums hold."""
        if self.marks[HELD] + count >= FULL:
            self._carried.append(self._lines())
            self.sums[:] = 0
            self.marks[HELD] = 0
        self.marks[HELD] += count

    def meet(self, top: int, least: int) -> None:
        """Note a row's largest and smallest signless pattern."""
        self.marks[TOP], self.marks[LEAST] = max(self.marks[TOP], top), min(self.marks[LEAST], least)

    def cover(self, low: int, high: int) -> None:
        """Grow to the bins from `low` to `high`; do nothing where `high` is below."""
        size = self.sums.shape[1] - 1
        if high < low or (size > 0 and low >= self.base and high < self.base + size):
            return
        if size > 0:
            low, high = min(low, self.base), max(high, self.base + size - 1)
        # Bin 0 is zero, which has column 0.
        base = max(1, (low // PAGE - 1) * PAGE)
        sums = self._zeros(min(HALF, (high // PAGE + 2) * PAGE) - base)
        sums[:, :1] = self.sums[:, :1]
        if size > 0:
            sums[:, 1 + self.base - base : 1 + self.base - base + size] = self.sums[:, 1:]
        self.base, self.sums = base, sums

    def widen(self, low: float, high: float) -> None:
        """Widen the extremes of x; NaN stays."""
        self.low, self.high = np.minimum(self.low, np.float32(low)), np.maximum(self.high, np.float32(high))

    def arrays(self) -> dict[str, Array]:
        """Return the fields of `SiteNumbers`: bins that occur with their counts, and the extremes."""
        found: dict[str, Array] = {}
        lines = [_joined(parts) for parts in zip(*self._carried, self._lines(), strict=True)]
        if self.counts:
            found["bins"], found["counts"] = _joined(lines)
        if self.signs:
            plus, minus = lines
            found["signed_bins"] = np.concatenate([plus[0], minus[0] + np.uint16(HALF)])
            found["signed_counts"] = np.concatenate([plus[1], minus[1]])
        ends = self.marks[[TOP, LEAST]].astype(np.uint32 if self.dtype == "float32" else np.uint16)
        signed = (self.low, self.high) if self.signs else (np.nan, np.nan)
        extremes = np.array([*floats_of(ends, self.dtype), *signed], dtype=np.float32)
        found["extremes"] = extremes + np.float32(0)  # turns −0 into 0
        return found

    def _lines(self) -> list[Sparse]:
        """Return the bins of each line that occur, and how often."""
        return [self._sparse(counts) for counts in self.sums]

    def _sparse(self, counts: NDArray[np.uint32]) -> Sparse:
        columns = np.flatnonzero(counts)
        bins = (columns + (self.base - 1)).astype(np.uint16)
        if len(columns) and columns[0] == 0:
            bins[0] = 0
        return bins, counts[columns].astype(np.int64)


def _joined(parts: Sequence[Sparse]) -> Sparse:
    return parts[0] if len(parts) == 1 else added(parts)


def record_size(tokens: int, peaks: int, itemsize: int) -> int:
    """Return the length of a record."""
    return tokens + tokens % 2 + 2 * peaks * 4 // itemsize


def maxima_of(record: Array, tokens: int) -> Array:
    """Return the signless patterns, [T]."""
    return record[:tokens]


def peaks_of(record: Array, tokens: int) -> NDArray[np.int32]:
    """Return the tokens of the largest maxima, largest first, and their channels, [2, K]."""
    return record[tokens + tokens % 2 :].view(np.int32).reshape(2, -1)


def joined_records(
    records: Sequence[Array], lengths: Sequence[int]
) -> tuple[Array, NDArray[np.int32], NDArray[np.int32]]:
    """Return the maxima of all records, [Σ T], and their peaks with the channels of these, [n, K] each; −1 for none."""
    found = [peaks_of(record, length) for record, length in zip(records, lengths, strict=True)]
    maxima = [maxima_of(record, length) for record, length in zip(records, lengths, strict=True)]
    return np.concatenate(maxima), padded([pair[0] for pair in found]), padded([pair[1] for pair in found])


def table_of_records(table: Array, length: int) -> tuple[Array, NDArray[np.int32], NDArray[np.int32]]:
    """Return what `joined_records` does, of records of one length [n, size]: the usual case, without a loop."""
    pairs = np.ascontiguousarray(table[:, length + length % 2 :]).view(np.int32)
    count = pairs.shape[1] // 2
    return table[:, :length].ravel(), pairs[:, :count].copy(), pairs[:, count:].copy()
