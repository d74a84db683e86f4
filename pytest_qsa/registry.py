"""What a metric is: its function and parameters, and what the planner and the baselines must know of it. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import plan
from .definitions import Definition
from .numbers import PADDING, SiteNumbers, lower_median
from .sinks import Sinks

Reduce = Literal["max", "mean", "sum", "p95"]
Per = Literal["layer", "model", "expert"]
Values = NDArray[np.float64]

REDUCTIONS: Mapping[str, Callable[[Values], float]] = {
    "max": lambda values: float(np.max(values)),
    "mean": lambda values: float(np.mean(values)),
    "sum": lambda values: float(np.sum(values)),
    "p95": lambda values: float(np.percentile(values, 95)),
}


@dataclass(frozen=True)
class View:
    """One site as a metric sees it: its numbers, and which tokens count."""

    numbers: SiteNumbers
    site: plan.Site
    positions: str
    sinks: Sinks
    layer: str = ""

    def kept(self, population: int) -> NDArray[np.bool_]:
        """Return [T] booleans, true at the tokens that count: no padding, and what `positions` says."""
        tokens = self.numbers.tokens_of(population)
        kept: NDArray[np.bool_] = tokens != PADDING
        if self.positions.startswith("skip_first:"):
            kept[np.flatnonzero(kept)[: int(self.positions.partition(":")[2])]] = False
        elif self.positions != "all":
            sinks = self.sinks.mask(int(self.numbers.sample[population]), len(tokens), self.layer)
            kept &= sinks if self.positions == "sink" else ~sinks
        return kept

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
    layer it is [P, E]. `statistics`: what a pass has to keep for these parameters and positions at this site.
    """

    reduce: Reduce | None
    tokenwise: bool
    positional: bool
    unit: str
    per: Per
    statistics: Callable[[plan.Site, str, Mapping[str, Any]], frozenset[str]]

    def needs(self, site: plan.Site, positions: str, parameters: Mapping[str, Any]) -> frozenset[str]:
        """Return the statistics that a pass has to keep."""
        defaults = {name: p.default for name, p in self.parameters.items()}
        needed = self.statistics(site, positions, {**defaults, **parameters})
        if plan.TOKENS in needed and site != "weight":
            needed |= {plan.SINKS}
        return needed


METRICS: dict[str, Metric] = {}


def metric(
    needs: str | Callable[[plan.Site, str, Mapping[str, Any]], frozenset[str]],
    *,
    reduce: Reduce | None,
    unit: str = "",
    tokenwise: bool = False,
    positional: bool = False,
    per: Per = "layer",
    version: int = 1,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a metric under its own name; `needs`: the statistic, or what names them."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        statistics = needs if callable(needs) else lambda site, positions, parameters: frozenset({needs})
        METRICS[function.__name__] = Metric(
            function.__name__, version, function, reduce, tokenwise, positional or tokenwise, unit, per, statistics
        )
        return function

    return register
