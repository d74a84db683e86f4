"""What the CPU's kernels write: the record of a row's tokens, and the window of a site's counts.

A record is one array of the patterns' dtype, [maxima | peaks | channels]. The maxima are signless patterns, one a token
that counts; the peaks (which of them are the largest) and the channels of these are int32, which in an array of 16 bits
take two elements each and begin at an even one. A window holds counts of the bins that occur, and no others: a tensor
uses some 3,000 of 32,768, which then stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...captures import added, padded

Sparse = tuple[NDArray[np.uint16], NDArray[np.int64]]
"""Bins, ascending, and their counts."""
HALF = 1 << 15
PAGE = 256
"""A window begins and ends at a multiple of this, two octaves of bfloat16, with as much to spare, so that it seldom
grows."""
FULL = 1 << 32
"""How many elements overflow a 32-bit count: the counts are carried over before that."""

HELD, TOP, LEAST = 0, 1, 2
"""The indices of a window's marks."""


def floats_of(patterns: NDArray[Any], dtype: str) -> NDArray[np.float32]:
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
    zeros: Callable[[tuple[int, ...], Any], NDArray[Any]] = np.zeros
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
        base = max(1, (low // PAGE - 1) * PAGE)
        sums = self._zeros(min(HALF, (high // PAGE + 2) * PAGE) - base)
        sums[:, :1] = self.sums[:, :1]
        if size > 0:
            sums[:, 1 + self.base - base : 1 + self.base - base + size] = self.sums[:, 1:]
        self.base, self.sums = base, sums

    def widen(self, low: float, high: float) -> None:
        """Widen the extremes of x; NaN stays."""
        self.low, self.high = np.minimum(self.low, np.float32(low)), np.maximum(self.high, np.float32(high))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the fields of `SiteNumbers`: bins that occur with their counts, and the extremes."""
        found: dict[str, NDArray[Any]] = {}
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


def maxima_of(record: NDArray[Any], tokens: int) -> NDArray[Any]:
    """Return the signless patterns, [T]."""
    return record[:tokens]


def peaks_of(record: NDArray[Any], tokens: int) -> NDArray[np.int32]:
    """Return the tokens of the largest maxima, largest first, and their channels, [2, K]."""
    return record[tokens + tokens % 2 :].view(np.int32).reshape(2, -1)


def joined_records(
    records: Sequence[NDArray[Any]], lengths: Sequence[int]
) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int32]]:
    """Return the maxima of all records, [Σ T], and their peaks with the channels of these, [n, K] each; −1 for none."""
    if len({*lengths}) == 1 and len({*map(len, records)}) == 1:
        table = np.stack(records)
        pairs = np.ascontiguousarray(table[:, lengths[0] + lengths[0] % 2 :]).view(np.int32)
        peaks, channels = np.hsplit(pairs, 2)
        return table[:, : lengths[0]].ravel(), peaks.copy(), channels.copy()
    found = [peaks_of(record, length) for record, length in zip(records, lengths, strict=True)]
    maxima = [maxima_of(record, length) for record, length in zip(records, lengths, strict=True)]
    return np.concatenate(maxima), padded([pair[0] for pair in found]), padded([pair[1] for pair in found])
