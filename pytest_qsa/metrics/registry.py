"""What a metric is: its function and parameters, and what the planner and the baselines must know of it. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..captures import (
    LOGITS,
    PADDING,
    REFERENCE_SINKS,
    SINKS,
    TOKENS,
    Sinks,
    Site,
    SiteNumbers,
    Statistic,
    lower_median,
)
from .definitions import Definition

Reduce = Literal["max", "mean", "sum", "p95"]
Per = Literal["layer", "model", "expert", "logits"]
Values = NDArray[np.float64]

TWO_SIDED_95 = 1.959963984540054
"""The quantile of the normal distribution for 95 % on both sides: so many standard errors to each end."""

REDUCTIONS: Mapping[str, Callable[[Values], float]] = {
    "max": lambda values: float(np.max(values)),
    "mean": lambda values: float(np.mean(values)),
    "sum": lambda values: float(np.sum(values)),
    "p95": lambda values: float(np.percentile(values, 95)),
}


@dataclass(frozen=True)
class Estimate:
    """A number that is known from `count` drawn values: within `low` … `high` in 95 of 100 cases."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class View:
    """One site as a metric sees it: its numbers, and which tokens count.

    `reference`: the reference's own numbers there, if any. `sampled`: the reference was kept for some tokens only.
    """

    numbers: SiteNumbers
    site: Site
    positions: str
    sinks: Sinks
    layer: str = ""
    reference: SiteNumbers | None = None
    sampled: bool = False

    def of_reference(self) -> View:
        """Return the same site of the reference, where the same tokens count."""
        assert self.reference is not None
        return replace(self, numbers=self.reference, reference=None)

    def among(self, population: int, counting: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return those of a population's tokens that count, [T] booleans, that `positions` names."""
        return self.sinks.among(self.positions, counting, int(self.numbers.sample[population]), self.layer)

    def kept(self, population: int) -> NDArray[np.bool_]:
        """Return [T] booleans, true at the tokens that count: no padding, and what `positions` says."""
        return self.among(population, self.numbers.tokens_of(population) != PADDING)

    def ratios(self, population: int) -> NDArray[np.float32]:
        """Return [T] multiples of the lower median of the tokens that count; −∞ elsewhere, or if it isn't above 0."""
        tokens, kept = self.numbers.tokens_of(population), self.kept(population)
        median = np.float32(lower_median(tokens[kept]))
        if not median > 0:
            return np.full(len(tokens), -np.inf, dtype=np.float32)
        return np.where(kept, tokens / median, np.float32(-np.inf))

    def token_maxima(self) -> Iterator[NDArray[np.float32]]:
        """Yield the token-wise maxima that count, one array a population."""
        for population in range(self.numbers.populations):
            yield self.numbers.tokens_of(population)[self.kept(population)]


@dataclass(frozen=True)
class Metric(Definition):
    """A metric and what must be known of it before and after the pass.

    `reduce`: how the samples are folded by default; None where the metric pools them itself.
    `per`: what one number is about; of a `model` it is computed from the views of all layers, for the `expert`s of a
    layer it is [P, E], for the `logits` the model's prediction is its one site. `statistics`: what a pass has to keep
    for these parameters and positions at this site. `against`: a second model is its reference. `sites`: where it can
    be asked for.
    """

    reduce: Reduce | None
    tokenwise: bool
    positional: bool
    unit: str
    per: Per
    statistics: Callable[[Site, str, Mapping[str, Any]], frozenset[Statistic]]
    against: bool
    sites: tuple[Site, ...]

    def positions_at(self, site: Site) -> str:
        """Return which tokens count unless told: against a reference all but the sinks (metrics.md)."""
        return "no_sink" if self.against and self.positional and site != "weight" else "all"

    def counts_tokens(self, site: Site, positions: str, parameters: Mapping[str, Any]) -> bool:
        """Say whether the tokens that count can be chosen here."""
        if site == "weight" or not self.positional:
            return False
        return self.against or TOKENS in self.needs(site, positions, parameters)

    def needs(self, site: Site, positions: str, parameters: Mapping[str, Any]) -> frozenset[Statistic]:
        """Return the statistics that a pass has to keep."""
        defaults = {name: p.default for name, p in self.parameters.items()}
        needed = self.statistics(site, positions, {**defaults, **parameters})
        if TOKENS in needed and site != "weight":
            needed |= {SINKS}
        if self.against and positions in ("sink", "no_sink") and site != "weight":
            needed |= {REFERENCE_SINKS}
        return needed


METRICS: dict[str, Metric] = {}


def metric(
    needs: Statistic | Callable[[Site, str, Mapping[str, Any]], frozenset[Statistic]],
    *,
    reduce: Reduce | None,
    unit: str = "",
    tokenwise: bool = False,
    positional: bool = False,
    per: Per = "layer",
    version: int = 1,
    against: bool = False,
    sites: tuple[Site, ...] = ("input", "output", "weight"),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a metric under its own name; `needs`: the statistic, or what names them."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        statistics = needs if callable(needs) else lambda site, positions, parameters: frozenset({needs})
        METRICS[function.__name__] = Metric(
            function.__name__, version, function, reduce, tokenwise, positional or tokenwise, unit, per, statistics,
            against, (LOGITS,) if per == "logits" else sites,
        )  # fmt: skip
        return function

    return register
