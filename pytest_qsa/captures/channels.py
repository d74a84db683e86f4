"""Distributions of single channels: counts in 16 steps an octave, which add up as all counts do. numpy only.

65,536 bins for each channel would be as large as the model. Here a bin is at most as wide as 1/16 of its lower end,
between 2⁻²⁴ and 2²⁴ (float16's whole range, and 256 times more); what is smaller counts as zero, the rest shares one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .numbers import EXTREME_NAMES, SiteNumbers

BandStat = Literal["min", "p0.01", "p1", "p25", "p75", "p99", "p99.99", "max"]
SHARES: Mapping[BandStat, float] = {
    "min": 0.0, "p0.01": 0.0001, "p1": 0.01, "p25": 0.25, "p75": 0.75, "p99": 0.99, "p99.99": 0.9999, "max": 1.0,
}  # fmt: skip

OCTAVES = (-24, 24)
STEPS = 16
CODES = (OCTAVES[1] - OCTAVES[0]) * STEPS + 2
"""The bins of one sign: zero, then 16 an octave, then all that is larger. −x stands `CODES` after x."""
SHIFT = 19
FIRST_CODE = (127 + OCTAVES[0]) * STEPS - 1
"""A float32 of magnitude pattern p falls into the bin (p >> SHIFT) − FIRST_CODE, clipped to 0 … CODES − 1."""


def channel_bands(numbers: SiteNumbers, *, signed: bool = False) -> dict[BandStat, NDArray[np.float64]]:
    """Return the min, the percentiles 0.01, 1, 25, 75, 99 and 99.99, and the max of each channel: name → [C].

    Of |x|, or of x if signed, interpolated as numpy does. The extremes are exact. Any other order statistic is within
    1/16 of its value (2⁻²⁴ of zero, for one that is smaller). A channel that holds NaN or Inf has NaN everywhere.
    """
    finite = np.isfinite(_extreme(numbers, "largest"))
    with np.errstate(invalid="ignore"):
        bins = _Bins.of(numbers, signed)
        return {name: np.where(finite, bins.quantile(share), np.nan) for name, share in SHARES.items()}


@dataclass(frozen=True)
class _Bins:
    """The bins of every channel, ascending in value: their two ends [B], their counts and cumulated counts [C, B].

    `least`, `most` [C]: the channel's own extremes; they cut the ends, so that no estimate leaves what occurred.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    counts: NDArray[np.int64]
    ends: NDArray[np.int64]
    least: NDArray[np.float64]
    most: NDArray[np.float64]

    @classmethod
    def of(cls, numbers: SiteNumbers, signed: bool) -> _Bins:
        low, high, counts = _signed_bins(numbers) if signed else _magnitude_bins(numbers)
        counts = np.ascontiguousarray(counts.T)
        least, most = (_extreme(numbers, name) for name in (("low", "high") if signed else ("smallest", "largest")))
        return cls(low, high, counts, np.cumsum(counts, axis=1), least, most)

    def quantile(self, share: float) -> NDArray[np.float64]:
        last = int(self.ends[0, -1]) - 1
        rank = share * last
        below = int(np.floor(rank))
        first, second = self._order_statistic(below, last), self._order_statistic(min(below + 1, last), last)
        return first + (second - first) * (rank - below)

    def _order_statistic(self, rank: int, last: int) -> NDArray[np.float64]:
        """Return the value at one rank of every channel: between its bin's ends, in proportion to its place there."""
        if rank in (0, last):
            return self.least if rank == 0 else self.most
        at = self._holding(rank)
        inside, end = (np.take_along_axis(table, at[:, None], axis=1)[:, 0] for table in (self.counts, self.ends))
        low, high = (np.clip(ends[at], self.least, self.most) for ends in (self.low, self.high))
        place = (rank - (end - inside) + 0.5) / inside
        value: NDArray[np.float64] = low + place * (high - low)
        return value

    def _holding(self, rank: int) -> NDArray[np.int64]:
        """Find the bin of one rank in every channel by one search: laid end to end, the cumulated counts ascend."""
        channels, bins = self.ends.shape
        before = np.arange(channels) * self.ends[0, -1]
        found: NDArray[np.int64] = (
            np.searchsorted(self._joined, before + rank, side="right") - np.arange(channels) * bins
        )
        return found

    @cached_property
    def _joined(self) -> NDArray[np.int64]:
        channels = len(self.ends)
        joined: NDArray[np.int64] = (self.ends + (np.arange(channels) * self.ends[0, -1])[:, None]).ravel()
        return joined


def _extreme(numbers: SiteNumbers, name: str) -> NDArray[np.float64]:
    assert numbers.channel_extremes is not None
    extreme: NDArray[np.float64] = numbers.channel_extremes[EXTREME_NAMES.index(name)].astype(np.float64)
    return extreme


Ends = NDArray[np.float64]


def _signed_bins(numbers: SiteNumbers) -> tuple[Ends, Ends, NDArray[np.int64]]:
    assert numbers.channel_bins is not None
    assert numbers.channel_counts is not None
    low, high = _ends_of(numbers.channel_bins % CODES)
    negative = numbers.channel_bins >= CODES
    low, high = np.where(negative, -high, low), np.where(negative, -low, high)
    order = np.argsort(low, kind="stable")
    return low[order], high[order], numbers.channel_counts[order].astype(np.int64)


def _magnitude_bins(numbers: SiteNumbers) -> tuple[Ends, Ends, NDArray[np.int64]]:
    assert numbers.channel_bins is not None
    assert numbers.channel_counts is not None
    codes, place = np.unique(numbers.channel_bins % CODES, return_inverse=True)
    counts = np.zeros((len(codes), numbers.channel_counts.shape[1]), dtype=np.int64)
    np.add.at(counts, place, numbers.channel_counts)
    return *_ends_of(codes), counts


def _ends_of(codes: NDArray[np.uint16]) -> tuple[Ends, Ends]:
    """Return the lower and the upper end of the magnitudes in each bin; both are 0 in the first one."""
    octave, step = np.divmod(codes.astype(np.int64) - 1, STEPS)
    low, high = (np.ldexp(1.0 + (step + end) / STEPS, octave + OCTAVES[0]) for end in (0, 1))
    high[codes == CODES - 1] = np.inf
    return np.where(codes == 0, 0.0, low), np.where(codes == 0, 0.0, high)
