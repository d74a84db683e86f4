"""Distributions from counts: a 16-bit float has 65,536 values, so that counting them keeps the exact distribution.

float32 is counted by its upper 16 bits, the same 65,536 patterns as bfloat16; a bin is then as wide as 2⁻⁷ of its value
and stands for its middle, so that a value read back is within 2⁻⁸ of the true one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .numbers import EXTREME_NAMES, SiteNumbers


def bin_values(bins: NDArray[np.uint16], dtype: str) -> NDArray[np.float64]:
    """Return the number that each 16-bit pattern stands for."""
    if dtype == "float16":
        with np.errstate(invalid="ignore"):
            return bins.view(np.float16).astype(np.float64)
    patterns = bins.astype(np.uint32) << 16
    if dtype != "bfloat16":
        exact = ((patterns & 0x7F800000) == 0x7F800000) | ((patterns & 0x7FFF0000) == 0)
        patterns = np.where(exact, patterns, patterns | 0x8000)
    with np.errstate(invalid="ignore"):  # widening a signalling NaN
        return patterns.astype(np.uint32).view(np.float32).astype(np.float64)


def sorted_counts(numbers: SiteNumbers, *, signed: bool = False) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the values that occur, ascending, and how often each does; NaN, if any, comes last."""
    bins, counts = (numbers.signed_bins, numbers.signed_counts) if signed else (numbers.bins, numbers.counts)
    assert bins is not None
    assert counts is not None
    values = bin_values(bins, numbers.dtype)
    order = np.argsort(values, kind="stable")
    return values[order], counts[order]


def counted_quantile(numbers: SiteNumbers, q: float, *, signed: bool = False) -> float:
    """Return the quantile of a counted distribution, with numpy's linear interpolation between two order statistics."""
    return counted_quantiles(numbers, [q], signed=signed)[0]


def counted_quantiles(numbers: SiteNumbers, shares: Sequence[float], *, signed: bool = False) -> list[float]:
    """Return several quantiles by one sort; NaN where the distribution holds NaN or Inf."""
    values, counts = sorted_counts(numbers, signed=signed)
    if not np.isfinite(values[[0, -1]]).all():
        return [float("nan")] * len(shares)
    ends = np.cumsum(counts)
    found = []
    for share in shares:
        rank = share * float(ends[-1] - 1)
        low = int(np.floor(rank))
        pair = (_order_statistic(numbers, values, ends, r, signed) for r in (low, min(low + 1, int(ends[-1]) - 1)))
        below, above = pair
        found.append(below + (above - below) * (rank - low))
    return found


def _order_statistic(
    numbers: SiteNumbers, values: NDArray[np.float64], ends: NDArray[np.int64], rank: int, signed: bool
) -> float:
    """Take one order statistic; the extremes are known exactly, whatever the width of a bin."""
    assert numbers.extremes is not None
    if rank in (0, ends[-1] - 1):
        name = ("low" if signed else "smallest") if rank == 0 else ("high" if signed else "largest")
        return float(numbers.extremes[EXTREME_NAMES.index(name)])
    return float(values[int(np.searchsorted(ends, rank, side="right"))])
