"""Simulated quantization: what a tensor would lose to a grid. numpy only.

Symmetric: the scale of a tensor (a token, a channel, a group) is its largest |x| over the largest number of the grid; x
is divided by it, rounded to the nearest number of the grid, halves to the even one, and multiplied by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..captures import EXTREME_NAMES, SiteNumbers, bin_values

Scheme = Literal["int8", "int4", "fp8_e4m3"]
Granularity = Literal["tensor", "token", "channel", "group"]
LARGEST_CODE: Mapping[Scheme, float] = {"int8": 127.0, "int4": 7.0, "fp8_e4m3": 448.0}
"""The largest number of each grid: −128 and −8 are not used; fp8_e4m3 is the OCP's e4m3, without infinities."""
MANTISSA_BITS, LEAST_EXPONENT = 3, -6
"""Of e4m3: bits of the mantissa, and the least exponent; all numbers below 2⁻⁶ are equally spaced."""
FINER = 32
"""A bin of float32 is split into this many values, each with an equal share of its count."""
LOSSLESS = 300.0
"""The SQNR in dB that stood for no error at all in baselines made before it was +∞."""


def rounded_to(scheme: Scheme, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the numbers of the grid nearest to the values, whose magnitudes it covers."""
    if scheme != "fp8_e4m3":
        return np.rint(values)
    # frexp's mantissa is below 1, so that its exponent is one more than the float's.
    exponents = np.maximum(np.frexp(values)[1] - 1, LEAST_EXPONENT)
    steps = np.ldexp(1.0, exponents - MANTISSA_BITS)
    nearest: NDArray[np.float64] = np.rint(values / steps) * steps
    return nearest


def counted_powers(numbers: SiteNumbers, scheme: Scheme) -> tuple[float, float]:
    """Return Σx² and Σ(x − x̂)² of a counted tensor that has one scale; NaN where it holds NaN or Inf.

    Exact for 16-bit tensors. A bin of float32 is as wide as a step of int8, so that its values are taken as evenly
    spread over it: an estimate.
    """
    largest = float(numbers.extremes[EXTREME_NAMES.index("largest")])
    if not np.isfinite(largest):
        return float("nan"), float("nan")
    values, weights = _magnitudes(numbers)
    # The middle of the last bin may be beyond the largest value, which is known exactly.
    values = np.minimum(values, largest)
    # 1 for a tensor of zeros.
    scale = largest / LARGEST_CODE[scheme] or 1.0
    errors = values - rounded_to(scheme, values / scale) * scale
    return float(np.sum(weights * values**2)), float(np.sum(weights * errors**2))


def _magnitudes(numbers: SiteNumbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if numbers.counted_exactly:
        return bin_values(numbers.bins, numbers.dtype), numbers.counts.astype(np.float64)
    # The middles of equal parts of the 2¹⁶ patterns in a bin.
    inside = (np.arange(FINER, dtype=np.uint32) * 2 + 1) * (0x8000 // FINER)
    patterns = (numbers.bins.astype(np.uint32)[:, None] << 16) | np.where(numbers.bins[:, None] > 0, inside, 0)
    values = patterns.astype(np.uint32).view(np.float32).astype(np.float64).reshape(-1)
    return values, np.repeat(numbers.counts / FINER, FINER)
