"""An assertion's numbers on several parts of the data → the bounds that a healthy model keeps to. numpy only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...captures import Capture
from ...common import AnomalyError
from ...metrics import TWO_SIDED_95, Series
from ...suite import SIDES, Assertion, MeasuredAssertion, Noise, Relative, Side, Stated
from ...verdicts import SPARE, key_of, measured, outward

FIGURES = 4
"""The significant digits of a mean and a sigma as a suite keeps them."""
IDENTICAL = 200.0
"""What stands for +∞ dB where nothing differs from the reference: float32's own rounding is at 150 dB."""
STANDARD_ERRORS = 2 * TWO_SIDED_95
"""So many are between the ends of a 95 % interval."""


@dataclass(frozen=True)
class Proposal:
    """A bound as the noise allows it. `group`: of a bound by group, else empty; `layer`: the one that decides.

    `bound`: what the suite says now.
    """

    side: Side
    group: str
    layer: str
    bound: float
    proposed: float
    noise: Noise


@dataclass(frozen=True)
class Spread:
    """The values of each layer on each part of the data, [parts, L], and on all of it, [L].

    `errors` [L]: the standard error of a part's value, where it is an estimate from that part's tokens; else 0.
    `tokens`: the values count tokens.
    """

    layers: Sequence[str]
    parts: NDArray[np.float64]
    whole: NDArray[np.float64]
    errors: NDArray[np.float64]
    tokens: bool = False

    @classmethod
    def of(cls, parts: Sequence[Series], whole: Series) -> Spread:
        """Put the series of the parts side by side.

        Raises:
            AnomalyError: they are not of the same layers, or they are fewer than two.
        """
        if len(parts) < 2:
            raise AnomalyError("one part of the data says nothing of the noise: give two at least")
        if any(series.layers != whole.layers for series in parts):
            raise AnomalyError("the parts of the data have not the same layers, so their noise can't be told")
        errors = np.mean([_errors(part) for part in parts], axis=0)
        values, tokens = np.stack([_finite(part) for part in parts]), whole.query.unit == "tokens"
        return cls(whole.layers, values, _finite(whole), errors, tokens)

    @property
    def sigmas(self) -> NDArray[np.float64]:
        """The standard deviation of each layer over the parts, [L]; exactly 0 where they are equal.

        An estimate's is no less than its standard error, for a few parts can lie together by chance.
        """
        apart = np.where(np.ptp(self.parts, axis=0) > 0, self.parts.std(axis=0, ddof=1), 0.0)
        return np.maximum(apart, self.errors)

    def noise(self, index: int, k: float) -> Noise:
        """Return the noise of one layer, rounded as a suite keeps it."""
        mean, sigma = (float(f"{of[index]:.{FIGURES}g}") for of in (self.parts.mean(axis=0), self.sigmas))
        return Noise(mean=mean, sigma=sigma, n=len(self.parts), k=k)

    def relative(self, k: float) -> tuple[str, float]:
        """Return the layer that varies most against its mean, and k sigmas of it: the drift that other text makes."""
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(self.sigmas > 0, k * self.sigmas / np.abs(self.parts.mean(axis=0)), 0.0)
        worst = int(np.argmax(shares))
        return self.layers[worst], float(shares[worst])


def _finite(series: Series) -> NDArray[np.float64]:
    return np.minimum(series.values, IDENTICAL) if series.query.unit == "dB" else series.values


def _errors(series: Series) -> NDArray[np.float64]:
    ends = [series.intervals.get(layer, (0.0, 0.0, 0)) for layer in series.layers]
    errors = [(high - low) / STANDARD_ERRORS if math.isfinite(high) else 0.0 for low, high, _ in ends]
    return np.array(errors, dtype=np.float64)


def proposals_of(assertion: Assertion, spread: Spread, schemes: Mapping[str, str] | None, k: float) -> list[Proposal]:
    """Return a proposal for each number that an assertion states as its `min` or `max`.

    A bound holds all layers of its group, so the layer whose mean ± k·sigma reaches farthest decides. It is rounded
    outward to two digits (to a whole number where all values are), and never tighter than what all the data gave. A
    number of tokens that was the same in all parts gets room for one more: n parts don't tell what comes in one of 2n.

    Raises:
        AnomalyError: a layer is in no group.
    """
    found = []
    for side in SIDES:
        stated = assertion.stated.get(side)
        for group, bound in _numbers(stated):
            layers = [i for i, name in enumerate(spread.layers) if _group(side, stated, name, schemes) == group]
            if layers:
                found.append(_proposal(side, group, bound, spread, layers, k))
    return found


def _numbers(stated: Stated | None) -> list[tuple[str, float]]:
    if isinstance(stated, dict):
        return [(group, bound) for group, bound in stated.items() if not isinstance(bound, Relative)]
    return [] if stated is None or isinstance(stated, Relative) else [("", stated)]


def _group(side: Side, stated: Stated | None, layer: str, schemes: Mapping[str, str] | None) -> str:
    assert stated is not None
    return (*key_of(side, stated, layer, schemes), "")[1]


def _proposal(side: Side, group: str, bound: float, spread: Spread, layers: Sequence[int], k: float) -> Proposal:
    farthest = max if side == "max" else min
    noises = {index: spread.noise(index, k) for index in layers}
    decides = farthest(layers, key=lambda index: noises[index].floor(side))
    reached = farthest(noises[decides].floor(side), *spread.whole[layers].tolist())
    whole = bool((spread.parts[:, layers] == np.round(spread.parts[:, layers])).all())
    if spread.tokens and side == "max" and noises[decides].steady:
        reached += SPARE
    proposed = float(math.ceil(reached) if side == "max" else math.floor(reached)) if whole else outward(side, reached)
    return Proposal(side, group, spread.layers[decides], bound, proposed, noises[decides])


@dataclass(frozen=True)
class Finding:
    """What calibration has to say of one assertion: its proposals, or why there are none."""

    id: str
    proposals: Sequence[Proposal] = ()
    remark: str = ""


@dataclass(frozen=True)
class Sampled:
    """What was measured: a capture of each part of the data, one of all of it, and of more passes over the first."""

    parts: Sequence[Capture]
    whole: Capture
    repeated: Sequence[Capture]

    def finding(self, assertion: Assertion, k: float) -> Finding:
        """Return what calibration has to say of an assertion.

        Raises:
            AnomalyError: a part gives it nothing sound.
        """
        if not isinstance(assertion, MeasuredAssertion):
            return Finding(assertion.id, remark="reads files, which do not vary")
        spread = Spread.of([measured(assertion, part) for part in self.parts], measured(assertion, self.whole))
        remarks = list(_remarks(assertion, spread, k))
        return Finding(assertion.id, proposals_of(assertion, spread, self.whole.schemes, k), "; ".join(remarks))

    def repeats(self, assertions: Sequence[Assertion]) -> float:
        """Return by how much, relative to its value, any number of a repeated pass differs from the first one's."""
        own = [each for each in assertions if isinstance(each, MeasuredAssertion)]
        return max((_apart(each, self.parts[0], again) for each in own for again in self.repeated), default=0.0)


def _apart(assertion: MeasuredAssertion, one: Capture, other: Capture) -> float:
    try:
        first, again = (_finite(measured(assertion, capture)) for capture in (one, other))
    except AnomalyError:  # what has no sound number can't be calibrated either, and that is told there
        return 0.0
    apart = np.abs(again - first)
    return float((apart[apart > 0] / np.abs(first[apart > 0])).max(initial=0.0))


def _remarks(assertion: MeasuredAssertion, spread: Spread, k: float) -> Iterator[str]:
    """Say of what is no plain bound how it varies."""
    if assertion.baseline is not None:
        layer, share = spread.relative(k)
        yield f"a baseline is held on its own text; another one moves {layer} by {share:.0%} ({k:g} sigma)"
    if assertion.equals is not None:
        differing = sorted(set(np.unique(spread.parts).tolist()))
        values = ", ".join(f"{value:g}" for value in differing[:4])
        yield f"equals {assertion.equals}: {values} in the {len(spread.parts)} parts"
    if assertion.follows:
        yield f"{assertion.follows} follows the last release"
