"""Distributions from counts: quantiles and histograms of a tensor, and percentiles of its single channels. numpy only.

A 16-bit float has 65,536 values, so that counting them keeps the exact distribution. float32 is counted by its upper 16
bits, the same 65,536 patterns as bfloat16; a bin is then as wide as 2⁻⁷ of its value and stands for its middle, so that
a value read back is within 2⁻⁸ of the true one.

65,536 bins for each channel would be as large as the model. A channel has 16 bins an octave, each at most as wide as
1/16 of its lower end, between 2⁻²⁴ and 2²⁴ (float16's whole range, and 256 times more); what is smaller counts as zero,
and what is larger shares one bin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .arrays import EXTREME_NAMES, PADDING, lower_median
from .sites import SiteNumbers

BandStat = Literal["min", "p0.01", "p1", "p25", "p75", "p99", "p99.99", "max"]
SHARES: Mapping[BandStat, float] = {
    "min": 0.0, "p0.01": 0.0001, "p1": 0.01, "p25": 0.25, "p75": 0.75, "p99": 0.99, "p99.99": 0.9999, "max": 1.0,
}  # fmt: skip

OCTAVES = (-24, 24)
STEPS = 16
CODES = (OCTAVES[1] - OCTAVES[0]) * STEPS + 2
"""The bins of one sign: zero, then 16 an octave, then all that is larger. The bin of −x is `CODES` after that of x."""
SHIFT = 19
FIRST_CODE = (127 + OCTAVES[0]) * STEPS - 1
"""A float32 of magnitude pattern p falls into the bin (p >> SHIFT) − FIRST_CODE, clipped to 0 … CODES − 1."""

PER_OCTAVE = 4
"""How many bins of a histogram an octave has."""
MOST_BINS = 20 * PER_OCTAVE
Ends = NDArray[np.float64]


def bin_values(bins: NDArray[np.uint16], dtype: str) -> NDArray[np.float64]:
    """Return the number that each 16-bit pattern stands for."""
    if dtype == "float16":
        with np.errstate(invalid="ignore"):
            return bins.view(np.float16).astype(np.float64)
    patterns = bins.astype(np.uint32) << 16
    if dtype != "bfloat16":
        # Zero, Inf and NaN stand for themselves, any other pattern for the middle of its bin.
        exact = ((patterns & 0x7F800000) == 0x7F800000) | ((patterns & 0x7FFF0000) == 0)
        patterns = np.where(exact, patterns, patterns | 0x8000)
    with np.errstate(invalid="ignore"):  # widening a signalling NaN
        return patterns.astype(np.uint32).view(np.float32).astype(np.float64)


def sorted_counts(numbers: SiteNumbers, *, signed: bool = False) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the values that occur, ascending, and how often each does; NaN, if any, comes last."""
    bins, counts = (numbers.signed_bins, numbers.signed_counts) if signed else (numbers.bins, numbers.counts)
    values = bin_values(bins, numbers.dtype)
    order = np.argsort(values, kind="stable")
    return values[order], counts[order]


def counted_quantile(numbers: SiteNumbers, q: float, *, signed: bool = False) -> float:
    """Return the quantile of a counted distribution, with numpy's linear interpolation between two order statistics."""
    return counted_quantiles(numbers, [q], signed=signed)[0]


def counted_quantiles(numbers: SiteNumbers, shares: Sequence[float], *, signed: bool = False) -> list[float]:
    """Return several quantiles by one sort; NaN where the distribution holds NaN or Inf."""
    values, counts = sorted_counts(numbers, signed=signed)
    # Sorted, −Inf comes first, Inf and NaN last.
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
    if rank in (0, ends[-1] - 1):
        name = ("low" if signed else "smallest") if rank == 0 else ("high" if signed else "largest")
        return float(numbers.extremes[EXTREME_NAMES.index(name)])
    return float(values[int(np.searchsorted(ends, rank, side="right"))])


def histograms_of(numbers: SiteNumbers) -> list[dict[str, Any]]:
    """Return the histograms of a site: of its |x|, if these were counted, and of its token-wise maxima."""
    found = []
    if "counts" in numbers:
        found.append(histogram("elements", *sorted_counts(numbers)))
    if "token_max" in numbers:
        maxima = numbers.token_max[numbers.token_max != PADDING].astype(np.float64)
        found.append(histogram("tokens", maxima, np.ones(len(maxima), dtype=np.int64)))
    return [each for each in found if each["total"]]


def histogram(of: str, values: NDArray[np.float64], counts: NDArray[np.int64]) -> dict[str, Any]:
    """Put magnitudes [N], each occurring counts [N] times, into bins; bin i begins at 2^((first + i)/4).

    At most 20 octaves below the largest value have bins; what is smaller is `below`. NaN and Inf are left out.
    """
    kept = np.isfinite(values)
    values, counts = values[kept], counts[kept]
    positive = values > 0
    places = np.floor(np.log2(values[positive]) * PER_OCTAVE).astype(np.int64)
    last = int(places.max(initial=0))
    first = max(int(places.min(initial=last)), last - MOST_BINS + 1) if places.size else last
    # The first count is of what lies below all bins.
    binned = np.bincount(np.maximum(places - first, -1) + 1, weights=counts[positive], minlength=last - first + 2)
    return {
        "of": of,
        "first": first,
        "counts": [int(count) for count in binned[1:]] if places.size else [],
        "below": int(binned[0]) if places.size else 0,
        "zeros": int(counts[~positive].sum()),
        "total": int(counts.sum()),
        "largest": float(values.max(initial=0.0)),
        "median": _median(values, counts),
    }


def _median(values: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Take the lower median of values that occur more than once each."""
    if not counts.sum():
        return float("nan")
    if (counts == 1).all():
        return lower_median(values)
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(ends, (ends[-1] - 1) // 2, side="right")])


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
    """The bins of every channel, ascending in value: their two ends [B].

    `cumulated` [C · B + 1]: the counts before each bin, of all channels end to end: it ascends, so that one search
    finds a rank in every channel. `least`, `most` [C]: the channel's own extremes, which clip the ends of its bins: no
    estimate lies beyond them.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    cumulated: NDArray[np.int64]
    least: NDArray[np.float64]
    most: NDArray[np.float64]

    @classmethod
    def of(cls, numbers: SiteNumbers, signed: bool) -> _Bins:
        low, high, counts = _signed_bins(numbers) if signed else _magnitude_bins(numbers)
        least, most = (_extreme(numbers, name) for name in (("low", "high") if signed else ("smallest", "largest")))
        return cls(low, high, np.concatenate([[0], np.cumsum(counts.T)]), least, most)

    def quantile(self, share: float) -> NDArray[np.float64]:
        last = int(self.cumulated[len(self.low)]) - 1  # every channel has equally many values
        rank = share * last
        below = int(np.floor(rank))
        first, second = self._order_statistic(below, last), self._order_statistic(min(below + 1, last), last)
        return first + (second - first) * (rank - below)

    def _order_statistic(self, rank: int, last: int) -> NDArray[np.float64]:
        """Return the value at one rank of every channel: between its bin's ends, in proportion to its place there."""
        if rank in (0, last):
            return self.least if rank == 0 else self.most
        channels = np.arange(len(self.least))
        ranks = channels * (last + 1) + rank
        holding = np.searchsorted(self.cumulated[1:], ranks, side="right")
        before, end = self.cumulated[holding], self.cumulated[holding + 1]
        at = holding - channels * len(self.low)
        low, high = (np.clip(ends[at], self.least, self.most) for ends in (self.low, self.high))
        # The values of a bin are taken as evenly spread, each in the middle of its share.
        place = (ranks - before + 0.5) / (end - before)
        value: NDArray[np.float64] = low + place * (high - low)
        return value


def _extreme(numbers: SiteNumbers, name: str) -> NDArray[np.float64]:
    extreme: NDArray[np.float64] = numbers.channel_extremes[EXTREME_NAMES.index(name)].astype(np.float64)
    return extreme


def _signed_bins(numbers: SiteNumbers) -> tuple[Ends, Ends, NDArray[np.int64]]:
    low, high = _ends_of(numbers.channel_bins % CODES)
    # With the sign turned, the upper end of a magnitude is the lower end of the value.
    negative = numbers.channel_bins >= CODES
    low, high = np.where(negative, -high, low), np.where(negative, -low, high)
    order = np.argsort(low, kind="stable")
    return low[order], high[order], numbers.channel_counts[order].astype(np.int64)


def _magnitude_bins(numbers: SiteNumbers) -> tuple[Ends, Ends, NDArray[np.int64]]:
    codes, place = np.unique(numbers.channel_bins % CODES, return_inverse=True)
    counts = np.zeros((len(codes), numbers.channel_counts.shape[1]), dtype=np.int64)
    negative = numbers.channel_bins >= CODES
    # x and −x share a bin here, and one `counts[place] += …` would add only one of the two.
    for side in (negative, ~negative):
        counts[place[side]] += numbers.channel_counts[side]
    return *_ends_of(codes), counts


def _ends_of(codes: NDArray[np.uint16]) -> tuple[Ends, Ends]:
    """Return the lower and the upper end of the magnitudes in each bin; both are 0 in the first one."""
    octave, step = np.divmod(codes.astype(np.int64) - 1, STEPS)
    low, high = (np.ldexp(1.0 + (step + end) / STEPS, octave + OCTAVES[0]) for end in (0, 1))
    # The last bin has all that is larger; the channel's own maximum clips it.
    high[codes == CODES - 1] = np.inf
    return np.where(codes == 0, 0.0, low), np.where(codes == 0, 0.0, high)
