"""95 % intervals of what is measured token by token, where the tokens of a window depend on one another. numpy only.

A window is one sample. What its tokens have in common widens an interval that takes them as independent: of the tokens
that a 4-bit model decides otherwise, from ± 0.015 to ± 0.033.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .registry import TWO_SIDED_95, Estimate
from .view import View

LEAST_WINDOWS = 8
"""Fewer give no interval: their spread is known too badly."""
LEVEL = 0.95

Floats = NDArray[np.float64]


@lru_cache
def t_quantile(degrees: int) -> float:
    """Return the quantile of Student's t that leaves 2.5 % above it, within 1e-6.

    The distribution is integrated in the angle θ with t = √ν · tan θ, where its density is ∝ cos^(ν−1) θ.
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(LEVEL, below / below[-1], angles))
    return math.sqrt(degrees) * math.tan(angle)


def windows_of(view: View) -> NDArray[np.int64]:
    """Return which window each position is of, [sum of lengths]."""
    return np.repeat(np.arange(view.numbers.populations, dtype=np.int64), view.numbers.lengths)


def mean_by_window(values: Floats, windows: NDArray[np.int64]) -> Estimate:
    """Return the mean of values [N] with its interval by window; `windows` [N]: which one each is of.

    The variance of the ratio of sums, linearised: n/(n − 1)·Σ(Σᵢ(x − mean))² / N², n windows; t with n − 1 degrees.
    The interval of fewer than 8 windows is NaN … NaN.
    """
    mean = float(values.mean())
    half = _half_width(values - mean, windows)
    return Estimate(mean, mean - half, mean + half, len(values))


def ratio_by_window(numerators: Floats, denominators: Floats) -> Estimate:
    """Return Σ numerators ÷ Σ denominators, [windows] each, with its interval, linearised as `mean_by_window` does.

    The interval of fewer than 8 windows is NaN … NaN.
    """
    ratio, windows = float(numerators.sum() / denominators.sum()), len(numerators)
    rests = (numerators - ratio * denominators) / denominators.sum()
    half = math.nan
    if windows >= LEAST_WINDOWS:
        half = t_quantile(windows - 1) * math.sqrt(windows / (windows - 1) * float(np.square(rests).sum()))
    return Estimate(ratio, ratio - half, ratio + half, windows)


def share_by_window(flags: NDArray[np.bool_], windows: NDArray[np.int64]) -> Estimate:
    """Return the share of true flags [N] with its interval by window, within 0 … 1; of 0 and of 1 it is Wilson's."""
    found = mean_by_window(flags.astype(np.float64), windows)
    if found.value in (0.0, 1.0) and not math.isnan(found.low):
        # No window differs from another, which says nothing of their spread.
        reach = TWO_SIDED_95**2 / (found.count + TWO_SIDED_95**2)
        low, high = (0.0, reach) if found.value == 0 else (1 - reach, 1.0)
        return Estimate(found.value, low, high, found.count)
    # The comparisons are false of NaN, which stays.
    low, high = 0.0 if found.low < 0 else found.low, 1.0 if found.high > 1 else found.high
    return Estimate(found.value, low, high, found.count)


def quantile_by_window(values: Floats, windows: NDArray[np.int64], share: float) -> Estimate:
    """Return a quantile of values [N] with its interval by window.

    Woodruff (JASA 47, 1952, 635): the interval of the share of values below it, turned into quantiles.
    """
    found = float(np.quantile(values, share))
    half = _half_width((values <= found) - np.mean(values <= found), windows)
    if math.isnan(half):
        return Estimate(found, half, half, len(values))
    low, high = np.quantile(values, [max(0.0, share - half), min(1.0, share + half)])
    return Estimate(found, float(low), float(high), len(values))


def _half_width(residuals: Floats, windows: NDArray[np.int64]) -> float:
    """Return half the width of the interval of a mean, of the values' distances from it; NaN of too few windows."""
    _, of_window = np.unique(windows, return_inverse=True)
    sums = np.bincount(of_window, weights=residuals)
    count = len(sums)
    if count < LEAST_WINDOWS:
        return math.nan
    variance = count / (count - 1) * float(np.square(sums).sum()) / len(residuals) ** 2
    return t_quantile(count - 1) * math.sqrt(variance)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Return the ends of Wilson's interval of 95 % of a share (Wilson 1927)."""
    share, z2 = successes / count, TWO_SIDED_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    width = TWO_SIDED_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return middle - width, middle + width


def newcombe(both: int, lost: int, gained: int, neither: int) -> tuple[float, float]:
    """Return the ends of the interval of 95 % of a paired difference of shares: the reference's minus the subject's.

    Method 10 of Newcombe, Statistics in Medicine 17 (1998), 2635: Wilson's intervals of both shares, joined by their
    correlation with a correction for continuity.
    """
    count = both + lost + gained + neither
    first, second = (both + lost) / count, (both + gained) / count
    low1, high1 = wilson(both + lost, count)
    low2, high2 = wilson(both + gained, count)
    scale = math.sqrt((both + lost) * (gained + neither) * (both + gained) * (lost + neither))
    product = float(both * neither - lost * gained)
    if product > 0:
        product = max(product - count / 2, 0.0)
    phi = product / scale if scale else 0.0

    def width(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    difference = first - second
    return difference - width(first - low1, high2 - second), difference + width(high1 - first, second - low2)
