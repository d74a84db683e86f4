"""Histograms for people to look at: quarter-octave bins of magnitudes, as plain values. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distributions import sorted_counts
from .numbers import PADDING, SiteNumbers, lower_median

PER_OCTAVE = 4
MOST_BINS = 20 * PER_OCTAVE


def histograms_of(numbers: SiteNumbers) -> list[dict[str, Any]]:
    """Return what a site has: the histogram of its |x| where they were counted, and of its token-wise maxima."""
    found = []
    if numbers.counts is not None:
        found.append(histogram("elements", *sorted_counts(numbers)))
    if numbers.token_max is not None:
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
