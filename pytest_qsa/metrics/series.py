"""Series: one number per layer, how it compares with a bound, and how a notebook shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from ..common import AnomalyError, counted, did_you_mean, html_table, number
from .query import Over, Query
from .registry import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OVER: Mapping[str, Callable[[NDArray[np.float64]], float]] = {
    "sum": lambda values: float(np.sum(values)),
    "max": lambda values: float(np.max(values)),
    "mean": lambda values: float(np.mean(values)),
}


MOST_SHOWN = 20
"""The most layers of a series that a notebook shows."""
MOST_RELATIVE = 10.0
"""The widest tolerance of a baseline, as a share of it; with a wider one nothing would be checked."""


@dataclass(frozen=True)
class Bounds:
    """What a value may be: `min ≤ value ≤ max`, or exactly `equals`; `strict` leaves the ends themselves out."""

    min: float | None = None
    max: float | None = None
    equals: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if any(bound is not None and math.isnan(bound) for bound in (self.min, self.max, self.equals)):
            raise AnomalyError("the bound is NaN: every comparison with it would be false")

    @property
    def low(self) -> float | None:
        """The least that a value may be."""
        return self.equals if self.equals is not None else self.min

    @property
    def high(self) -> float | None:
        """The most that a value may be."""
        return self.equals if self.equals is not None else self.max

    def excess(self, value: float) -> float:
        """Return by how much the value is out of bounds: 0 inside, negative below, positive above."""
        low, high = self.low, self.high
        if high is not None and (value > high or (self.strict and value == high)):
            # A strict bound may be met exactly: an excess of 0 would mean that it holds.
            return value - high or math.ulp(0.0)
        if low is not None and (value < low or (self.strict and value == low)):
            return value - low or -math.ulp(0.0)
        return 0.0

    def __str__(self) -> str:
        """Write the bound as a suite does: `max 4`."""
        less, more = ("<", ">") if self.strict else ("max", "min")
        parts = [(more, self.min), (less, self.max), ("equals", self.equals)]
        return ", ".join(f"{word} {number:g}" for word, number in parts if number is not None)


Judge = Callable[["Series", Bounds], bool]


def sound(value: float, unit: str) -> bool:
    """Say whether a value can be compared with a bound: it is finite, or +∞ dB, the SQNR of equal tensors."""
    return math.isfinite(value) or (unit == "dB" and value == math.inf)


@dataclass(frozen=True, eq=False)
class Series:
    """One number per layer. `values` [L] float64 in model order; `populations`: layer → the values before folding.

    `problems`: layer → why its value is not finite. `nothing`: why none of the values is about anything; else empty.
    `left_out`: the layers of a portable name (`kind:linears`) that can't have a value. `intervals`: layer → the 95 %
    interval of an estimated value, and from how many drawn ones. `least`: layer → the least that its value could have
    been, where what it is compared with says so. Comparing (`<=`, `==`, …) asks whether every layer
    satisfies it, and raises where there is nothing sound to compare. Within pytest `judge` records the verdict as well.

    Otherwise it is read as a Series of pandas: `len`, iteration over the values, `items()`, `in` for the name of a
    layer, and `series[…]` with a name or a position for a value, with a slice for a series.
    """

    layers: list[str]
    values: NDArray[np.float64]
    query: Query
    populations: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    judge: Judge | None = None
    intervals: Mapping[str, tuple[float, float, int]] = field(default_factory=dict)
    nothing: str = ""
    left_out: Sequence[str] = ()
    least: Mapping[str, float] = field(default_factory=dict)

    # `==` judges against a bound, so that a series can't be a key.
    __hash__ = None  # type: ignore[assignment]
    # A bound may be a scalar of numpy, which would otherwise compare itself with each value.
    __array_ufunc__ = None

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[float]:
        return iter(self.values.tolist())

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    @overload
    def __getitem__(self, key: str | int) -> float: ...
    @overload
    def __getitem__(self, key: slice) -> Series: ...
    def __getitem__(self, key: str | int | slice) -> float | Series:
        if isinstance(key, slice):
            return self._at(range(len(self))[key])
        if not isinstance(key, str):
            return float(self.values[key])
        if key not in self.layers:
            raise KeyError(f"the series has no layer '{key}'{did_you_mean(key, self.layers)}")
        return float(self.values[self.layers.index(key)])

    def _at(self, indices: Iterable[int]) -> Series:
        chosen = list(indices)
        return replace(self, layers=[self.layers[index] for index in chosen], values=self.values[chosen])

    def items(self) -> Iterator[tuple[str, float]]:
        """Yield the name and the value of each layer, in model order."""
        return zip(self.layers, self.values.tolist(), strict=True)

    def worst(self, count: int = 1) -> Series:
        """Return the `count` worst layers, the worst first: the largest values, or the smallest of a metric like SQNR.

        A value that is not finite is worse than any other.
        """
        known = METRICS.get(self.query.metric)
        sign = 1.0 if known is not None and known.worst == "lowest" else -1.0
        # Stable, so that of equal layers the first in the model comes first.
        order = np.argsort(np.where(np.isnan(self.values), -np.inf, sign * self.values), kind="stable")
        return self._at(order[:count].tolist())

    def require(self, *, min: float | None = None, max: float | None = None, equals: float | None = None) -> Series:
        """Return the series if every layer is within the bounds; for scripts and notebooks, where `assert` says little.

        Raises:
            AssertionError: some are not; the text says how many, and which one is worst.
            AnomalyError: as `check`.
        """
        bounds = Bounds(min, max, equals)
        if bounds == Bounds():
            raise TypeError("require() needs a bound: min=, max= or equals=")
        if not self.within(bounds):
            out = [(abs(bounds.excess(value)), layer, value) for layer, value in self.items() if bounds.excess(value)]
            _, layer, value = sorted(out, key=lambda entry: -entry[0])[0]
            raise AssertionError(
                f"{self.query}: {len(out)} of {len(self)} {self.query.of} out of bounds ({bounds}); "
                f"worst {layer}: {number(value)}"
            )
        return self

    def to_dict(self) -> dict[str, float]:
        """Return layer → value, in model order."""
        return dict(self.items())

    def to_pandas(self) -> Any:  # pandas.Series, which ships no types
        """Return it as a Series of pandas: the index is the layers, the name is the metric. Needs pandas."""
        import pandas as pd  # type: ignore[import-untyped,unused-ignore]

        return pd.Series(self.values, index=pd.Index(self.layers, name="layer"), name=self.query.metric)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the values over the layers in model order, the worst one named; return the axes, for changes of yours.

        `ax`: axes to draw on; by default a new figure, which a notebook shows.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(figsize=(8, 3), layout="constrained")
        ax.plot(self.values, marker="o", markersize=3, linewidth=1)
        if len(self):
            layer = self.worst().layers[0]
            index = self.layers.index(layer)
            ax.set_title(f"{self.query.metric}: worst {layer}, {number(self.values[index])} {self.query.unit}".rstrip())
        ax.set_xlabel(f"{self.query.of} in model order")
        ax.set_ylabel(f"{self.query.metric}{f' [{self.query.unit}]' if self.query.unit else ''}")
        return ax

    def _repr_html_(self) -> str:
        """Return the table that a notebook shows: all layers in model order, or the worst ones of many."""
        shown = self if len(self) <= MOST_SHOWN else self.worst(MOST_SHOWN)
        more = f"; the {MOST_SHOWN} worst of {len(self)} {self.query.of}" if len(self) > MOST_SHOWN else ""
        heads = [self.query.of.removesuffix("s"), self.query.unit or "value"]
        return html_table([heads, *([layer, number(value)] for layer, value in shown.items())], f"{self.query}{more}")

    def check(self) -> None:
        """Raise unless there is at least one layer, every value is finite, and some layer isn't all zeros.

        Raises:
            AnomalyError: the series is empty, holds NaN or Inf, or is of a dead model; the text names the layers.
        """
        if not self.layers:
            raise AnomalyError("the series is empty: no layer was measured")
        values = zip(self.layers, self.values.tolist(), strict=True)
        bad = [layer for layer, value in values if not sound(value, self.query.unit)]
        if bad:
            first = bad[0]
            reason = self.problems.get(first, "the value is not finite")
            more = f" (and {len(bad) - 1} more layers)" if len(bad) > 1 else ""
            raise AnomalyError(f"{self.query.metric} is not finite at {first}{more}: {reason}")
        metric = METRICS.get(self.query.metric)
        # Any bound from above holds of zeros. A user's own metric may be there to count them.
        if self.nothing and metric is not None and metric.name != "zero_fraction" and not metric.origin:
            raise AnomalyError(
                f"{self.nothing}, so {metric.name} says nothing: look at what was loaded, or hold zero_fraction "
                "against a bound if it is meant so"
            )

    def folded(self, over: Over | None) -> Series:
        """Fold the layers into one number; the label says how many they were."""
        if over is None or not self.layers:
            return self
        # The number is of no single layer, so its label must not look like the name of one.
        label = f"{over} of {len(self.layers)} layers"
        problems = {label: next(iter(self.problems.values()))} if self.problems else {}
        values = np.array([OVER[over](self.values)])
        return replace(self, layers=[label], values=values, query=replace(self.query, over=over), problems=problems)

    def _check_span(self, bounds: Bounds) -> None:
        metric = METRICS.get(self.query.metric)
        # `< inf` of decibels says that something differs.
        if metric is None or (self.query.unit == "dB" and bounds.strict):
            return
        low = metric.checks_nothing("min", bounds.min, self.query.over) if bounds.min is not None else None
        high = metric.checks_nothing("max", bounds.max, self.query.over) if bounds.max is not None else None
        if problem := low or high:
            raise AnomalyError(problem)

    def within(self, bounds: Bounds) -> bool:
        """Say whether every layer is within the bounds.

        Raises:
            AnomalyError: as `check`.
        """
        if self.judge is None:
            self.check()
        self._check_span(bounds)
        if self.judge is not None:
            return self.judge(self, bounds)
        return not any(bounds.excess(value) for value in self.values.tolist())

    def __le__(self, bound: object) -> bool:
        return self.within(Bounds(max=float(bound))) if isinstance(bound, Real) else NotImplemented

    def __ge__(self, bound: object) -> bool:
        return self.within(Bounds(min=float(bound))) if isinstance(bound, Real) else NotImplemented

    def __lt__(self, bound: object) -> bool:
        return self.within(Bounds(max=float(bound), strict=True)) if isinstance(bound, Real) else NotImplemented

    def __gt__(self, bound: object) -> bool:
        return self.within(Bounds(min=float(bound), strict=True)) if isinstance(bound, Real) else NotImplemented

    def __eq__(self, bound: object) -> bool:
        if isinstance(bound, Real):
            return self.within(Bounds(equals=float(bound)))
        # A baseline compares itself: Python then tries its reflected `==`.
        if getattr(bound, "judges_series", False):
            return NotImplemented
        raise TypeError(f"a series is compared with a number or a baseline, not with {type(bound).__name__}")

    def __ne__(self, bound: object) -> bool:
        raise TypeError("`!=` has no meaning over many layers: use <=, >= or ==")

    def __bool__(self) -> bool:
        # `assert series` would otherwise always hold.
        raise TypeError("a series of layers is neither true nor false: compare it with a bound, as in `series <= 1`")

    def __repr__(self) -> str:
        head = ", ".join(f"{name}: {value:g}" for name, value in zip(self.layers[:3], self.values[:3], strict=True))
        more = ", …" if len(self.layers) > 3 else ""
        return (
            f"<{self.query}: {counted(len(self), self.query.of.removesuffix('s'))}{' | ' + head if head else ''}{more}>"
        )
