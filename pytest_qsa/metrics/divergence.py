"""How far apart the distributions of |x| are in two captures, layer by layer, from their counts. numpy only.

Exact for two captures of one 16-bit dtype; float32 is counted by its upper half, so that a value is known within 2⁻⁸.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..captures import Site, SiteNumbers, sorted_counts
from ..common import AnomalyError, SuiteError
from .query import Query
from .registry import Parameters
from .series import Series

if TYPE_CHECKING:
    from ..captures import Capture

LEAST_SHARE = 1e-4
"""The share that an empty bin counts as in `psi`, because the logarithm of 0 has no value."""

Measure = Callable[[SiteNumbers, SiteNumbers], float]


def ks(old: Capture, new: Capture, layers: str, site: Site, *, exclude: str | None = None) -> Series:
    """Take the largest distance between the two cumulative distributions, 0 … 1 (Kolmogorov–Smirnov).

    Raises:
        AnomalyError: no layer, other layers in the other capture, or a site whose |x| was not counted.
    """
    return _series("ks", ks_of, (old, new), (layers, site, exclude), {})


def wasserstein(
    old: Capture, new: Capture, layers: str, site: Site, *, exclude: str | None = None, relative: bool = False
) -> Series:
    """Take the area between the two cumulative distributions, in units of x (the 1-Wasserstein distance).

    `relative` divides it by the mean |x| of the old capture. Raises as `ks`.
    """

    def measure(one: SiteNumbers, other: SiteNumbers) -> float:
        return wasserstein_of(one, other, relative=relative)

    return _series("wasserstein", measure, (old, new), (layers, site, exclude), {"relative": relative})


def psi(old: Capture, new: Capture, layers: str, site: Site, *, exclude: str | None = None, bins: int = 10) -> Series:
    """Take the population stability index Σ (p − q)·ln(p / q) over the quantile bins of the old capture.

    Scorecards read below 0.1 as stable, above 0.25 as another population. An empty bin counts as 1e-4. Raises as `ks`.
    """
    if bins < 2:
        raise SuiteError(f"psi: bins is 2 or more, not {bins}", "bins")

    def measure(one: SiteNumbers, other: SiteNumbers) -> float:
        return psi_of(one, other, bins=bins)

    return _series("psi", measure, (old, new), (layers, site, exclude), {"bins": bins})


def ks_of(old: SiteNumbers, new: SiteNumbers) -> float:
    """Return `ks` of one site; NaN if either side holds NaN or Inf."""
    _, before, after = _cumulated(old, new)
    return float(np.abs(before - after).max())


def wasserstein_of(old: SiteNumbers, new: SiteNumbers, *, relative: bool = False) -> float:
    """Return `wasserstein` of one site; NaN if either side holds NaN or Inf."""
    values, before, after = _cumulated(old, new)
    # The cumulated shares are steps: from one value to the next they stay what they are at the lower one.
    distance = float(np.sum(np.abs(before - after)[:-1] * np.diff(values)))
    if not relative:
        return distance
    # A site of zeros alone gives NaN or Inf here, which `_series` reports as a problem of its layer.
    own, counts = sorted_counts(old)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(distance / np.average(own, weights=counts))


def psi_of(old: SiteNumbers, new: SiteNumbers, *, bins: int = 10) -> float:
    """Return `psi` of one site; NaN if either side holds NaN or Inf. Bins that end at the same value are joined."""
    _, before, after = _cumulated(old, new)
    if not np.isfinite(before).all():
        return float("nan")
    # A value that many elements share ends several bins at once; kept apart, all but one would be empty.
    ends = np.unique(np.searchsorted(before, np.arange(1, bins) / bins))
    shares = [np.diff(np.concatenate([[0.0], cumulated[ends], [1.0]])) for cumulated in (before, after)]
    p, q = (np.maximum(share, LEAST_SHARE) for share in shares)
    return float(np.sum((p - q) * np.log(p / q)))


def _cumulated(
    old: SiteNumbers, new: SiteNumbers
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return all values that occur, ascending, [V], and for both sides the share that is at or below each, [V]."""
    sides = [sorted_counts(numbers) for numbers in (old, new)]
    values = np.unique(np.concatenate([own for own, _ in sides]))
    if not np.isfinite(values).all():
        return values, *(np.full(len(values), np.nan),) * 2
    cumulated = []
    for own, counts in sides:
        ends = np.concatenate([[0], np.cumsum(counts)])
        cumulated.append(ends[np.searchsorted(own, values, side="right")] / ends[-1])
    return values, *cumulated


def _series(
    name: str,
    measure: Measure,
    captures: tuple[Capture, Capture],
    where: tuple[str, Site, str | None],
    parameters: Parameters,
) -> Series:
    pattern, site, exclude = where
    selections = [capture.select(pattern, site, exclude) for capture in captures]
    layers, others = (selection.layers for selection in selections)
    if layers != others:
        missing = sorted({*layers} ^ {*others})
        raise AnomalyError(f"the captures hold different layers: {', '.join(missing[:3])} are in one of them only")
    pairs = [(captures[0].sites[layer, site], captures[1].sites[layer, site]) for layer in layers]
    for layer, pair in zip(layers, pairs, strict=True):
        if any("counts" not in numbers for numbers in pair):
            raise AnomalyError(
                f"the |x| of the {site} of {layer} are not counted in both captures: name quantile among the statistics"
            )
    values = np.array([measure(*pair) for pair in pairs], dtype=np.float64)
    problems = {
        layer: "one of the two captures holds NaN or Inf there"
        for layer, value in zip(layers, values, strict=True)
        if not np.isfinite(value)
    }
    # A bin of float32 holds many values, so its numbers are estimates.
    wide = not all(numbers.counted_exactly for pair in pairs for numbers in pair)
    query = Query(name, f"{name}/1", site, pattern, exclude, parameters, estimated=wide)
    return Series(layers, values, query, problems=problems)
