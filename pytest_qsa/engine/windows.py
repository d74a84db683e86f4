"""Counts of the bins that occur, and no others: a tensor uses some 3,000 of 32,768, which then stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

HALF = 1 << 15
PAGE = 256
"""A window begins and ends at a multiple of this, two octaves of bfloat16, so that it seldom has to grow."""


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

    `magnitudes` [W] int64 and `signed` [2, W], for +x and −x; either is empty where it isn't wanted. `top`, `least`:
    the largest and the smallest signless pattern; `low`, `high`: the ends of x, where signs count.
    """

    counts: bool
    signs: bool
    dtype: str
    base: int = 1
    top: int = 0
    least: int = 0xFFFFFFFF
    low: np.float32 = field(default=np.float32("inf"))
    high: np.float32 = field(default=np.float32("-inf"))

    def __post_init__(self) -> None:
        self.magnitudes, self.signed = self._zeros(0)

    def _zeros(self, bins: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return (
            np.zeros(bins + 1 if self.counts else 0, dtype=np.int64),
            np.zeros((2, bins + 1 if self.signs else 0), dtype=np.int64),
        )

    def cover(self, low: int, high: int) -> None:
        """Make room for the bins from `low` to `high`; none where `high` is below."""
        size = max(self.magnitudes.shape[0], self.signed.shape[1]) - 1
        if high < low or (size and low >= self.base and high < self.base + size):
            return
        if size:
            low, high = min(low, self.base), max(high, self.base + size - 1)
        base = max(1, low // PAGE * PAGE)
        end = min(HALF, (high // PAGE + 1) * PAGE)
        magnitudes, signed = self._zeros(end - base)
        for old, new in ((self.magnitudes[None], magnitudes[None]), (self.signed, signed)):
            if old.shape[1]:
                new[:, 0] = old[:, 0]
                new[:, 1 + self.base - base : 1 + self.base - base + size] = old[:, 1:]
        self.base, self.magnitudes, self.signed = base, magnitudes, signed

    def widen(self, low: float, high: float) -> None:
        """Widen the ends of x; NaN stays."""
        self.low, self.high = np.minimum(self.low, np.float32(low)), np.maximum(self.high, np.float32(high))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the fields of `SiteNumbers`: bins that occur with their counts, and the extremes."""
        found: dict[str, NDArray[Any]] = {}
        if self.counts:
            found["bins"], found["counts"] = self._sparse(self.magnitudes)
        if self.signs:
            plus, minus = (self._sparse(counts) for counts in self.signed)
            found["signed_bins"] = np.concatenate([plus[0], minus[0] + np.uint16(HALF)])
            found["signed_counts"] = np.concatenate([plus[1], minus[1]])
        ends = np.array([self.top, self.least], dtype=np.uint32 if self.dtype == "float32" else np.uint16)
        signed = (self.low, self.high) if self.signs else (np.nan, np.nan)
        extremes = np.array([*floats_of(ends, self.dtype), *signed], dtype=np.float32)
        found["extremes"] = extremes + np.float32(0)  # −0 is 0
        return found

    def _sparse(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        columns = np.flatnonzero(counts)
        return np.where(columns, self.base + columns - 1, 0).astype(np.uint16), counts[columns]
