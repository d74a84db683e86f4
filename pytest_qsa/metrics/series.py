"""Series: one number per layer, the query that it answers, and how it compares with a bound."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import Any, Literal, TypedDict, get_args, get_origin

import numpy as np
from numpy.typing import NDArray

from ..captures import LOGITS, Site
from ..common import AnomalyError, SuiteError, did_you_mean
from .registry import AGGREGATIONS, METRICS, Metric, Parameters, Reduce

CHECKPOINT = "checkpoint"
"""The site in the query of a static check, which looks at files and at no tensor stream."""
EVALS = "evals"
"""The site in the query of an external assertion, whose numbers are of tasks and not of layers."""
Over = Literal["sum", "max", "mean"]
OVER: Mapping[str, Callable[[NDArray[np.float64]], float]] = {
    "sum": lambda values: float(np.sum(values)),
    "max": lambda values: float(np.max(values)),
    "mean": lambda values: float(np.mean(values)),
}


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


@dataclass(frozen=True)
class Query:
    """How a series was asked for: the metric with its definition, where, and how it was folded.

    `estimated`: it was computed from counts of a tensor that has more than 16 bits. `from_files`: its weights are those
    of the checkpoint's files, not of a loaded model.
    """

    metric: str
    definition: str
    site: str
    layers: str
    exclude: str | None = None
    parameters: Parameters = field(default_factory=dict)
    positions: str | None = None
    reduce: str | None = None
    over: Over | None = None
    unit: str = ""
    estimated: bool = False
    from_files: bool = False

    def __str__(self) -> str:
        """Write it in one line, as a failure shows it."""
        arguments = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.parameters.items())
        where = {CHECKPOINT: "in the files, layers", EVALS: "of"}.get(self.site, f"at the {self.site} of")
        text = f"{self.metric}({arguments})" + ("" if self.site == LOGITS else f" {where} '{self.layers}'")
        if self.reduce:
            text += f", {self.reduce} over samples"
        text += f", {self.over} over {self.of}" if self.over else ""
        text += ", read from the files" if self.from_files else ""
        return text + (", estimated from float32's upper 16 bits" if self.estimated else "")

    @property
    def of(self) -> str:
        """What its numbers are about: layers, the experts in them, or the tasks of an eval."""
        if self.site == EVALS:
            return "tasks"
        return "experts" if self.metric in METRICS and METRICS[self.metric].per == "expert" else "layers"

    def plain(self) -> PlainQuery:
        """Return it as plain values, with its text."""
        return {"text": str(self), "of": self.of, **asdict(self)}  # type: ignore[typeddict-item]


class PlainQuery(TypedDict, total=False):
    """A query as plain values, as verdicts and reports hold it; empty where an error came before there was one."""

    text: str
    of: str
    metric: str
    definition: str
    site: Any  # `Site`, `CHECKPOINT` or `EVALS`
    layers: str
    exclude: str | None
    parameters: Parameters
    positions: str | None
    reduce: Reduce | None
    over: Over | None
    unit: str
    estimated: bool
    from_files: bool


Judge = Callable[["Series", Bounds], bool]


def sound(value: float, unit: str) -> bool:
    """Say whether a value can be compared with a bound: it is finite, or +∞ dB, the SQNR of equal tensors."""
    return math.isfinite(value) or (unit == "dB" and value == math.inf)


@dataclass(frozen=True, eq=False)
class Series:
    """One number per layer. `values` [L] float64 in model order; `populations`: layer → the values before folding.

    `problems`: layer → why its value is not finite. `intervals`: layer → the 95 % interval of an estimated value, and
    from how many drawn ones. Comparing (`<=`, `==`, …) asks whether every layer satisfies it,
    and raises where there is nothing sound to compare. Within pytest `judge` records the verdict as well.
    """

    layers: list[str]
    values: NDArray[np.float64]
    query: Query
    populations: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    judge: Judge | None = None
    intervals: Mapping[str, tuple[float, float, int]] = field(default_factory=dict)

    # `==` judges against a bound, so that a series can't be a key.
    __hash__ = None  # type: ignore[assignment]

    def check(self) -> None:
        """Raise unless there is at least one layer and every value is finite.

        Raises:
            AnomalyError: the series is empty, or holds NaN or Inf; the text names the layers.
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

    def folded(self, over: Over | None) -> Series:
        """Fold the layers into one number; the label says how many they were."""
        if over is None or not self.layers:
            return self
        # The number is of no single layer, so its label must not look like the name of one.
        label = f"{over} of {len(self.layers)} layers"
        problems = {label: next(iter(self.problems.values()))} if self.problems else {}
        values = np.array([OVER[over](self.values)])
        return replace(self, layers=[label], values=values, query=replace(self.query, over=over), problems=problems)

    def within(self, bounds: Bounds) -> bool:
        """Say whether every layer is within the bounds.

        Raises:
            AnomalyError: as `check`.
        """
        if self.judge is not None:
            return self.judge(self, bounds)
        self.check()
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
        return f"<{self.query}: {len(self.layers)} layers{' | ' + head if head else ''}{more}>"


Positions = str | Mapping[str, int]
"""`all`, `no_sink`, `sink` or `{"skip_first": n}`."""


def check_arguments(metric: Metric, site: Site, positions: str, reduce: str | None, parameters: Parameters) -> None:
    """Check what a metric is asked with.

    Raises:
        SuiteError: it doesn't take that.
    """
    for name, value in parameters.items():
        choices = _choices(metric.parameters[name].annotation)
        if choices and value not in choices:
            raise SuiteError(f"{metric.name}: {name} is one of {', '.join(map(str, choices))}, not {value!r}", name)
    if reduce is not None and (metric.reduce is None or reduce not in AGGREGATIONS):
        takes = ", ".join(AGGREGATIONS) if metric.reduce else "none, for it pools all samples itself"
        raise SuiteError(f"{metric.name}: reduce is one of {takes}; not {reduce!r}", "reduce")
    if site not in metric.sites:
        places = " or ".join(metric.sites)
        raise SuiteError(f"{metric.name} is a metric of the {places}, not of the {site}", "site")
    if positions != "all" and not metric.counts_tokens(site, positions, parameters):
        raise SuiteError(f"{metric.name} counts no tokens here, so it takes no positions", "positions")


def _choices(annotation: Any) -> list[Any]:
    """Return the values of a Literal, or of a union with one; nothing for a type that is open."""
    arms = get_args(annotation)
    if get_origin(annotation) is Literal:
        return list(arms)
    return [choice for arm in arms for choice in ([None] if arm is type(None) else _choices(arm))]


def query_of(
    metric: str,
    site: Site,
    layers: str,
    exclude: str | None,
    parameters: Parameters,
    positions: str,
    reduce: Reduce | None,
) -> Query:
    """Return the query, completed with the metric's own defaults."""
    definition = METRICS[metric]
    defaults = {name: p.default for name, p in definition.parameters.items()}
    return Query(
        metric,
        definition.definition,
        site,
        layers,
        exclude,
        defaults | dict(parameters),
        positions if definition.positional else None,
        reduce or definition.reduce,
        None,
        definition.unit,
    )


def positions_of(metric: str, site: Site, positions: Positions | None) -> str:
    """Return which tokens count, in canonical form: the metric's own choice where nothing is said.

    Raises:
        ValueError: as `canonical_positions`.
    """
    return canonical_positions(METRICS[metric].positions_at(site) if positions is None else positions)


def canonical_positions(positions: Positions) -> str:
    """Return `all`, `no_sink`, `sink` or `skip_first:n`.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(positions, Mapping):
        count = positions.get("skip_first")
        # bool is a subclass of int.
        if set(positions) == {"skip_first"} and isinstance(count, int) and not isinstance(count, bool) and count >= 0:
            return f"skip_first:{count}"
    elif isinstance(positions, str) and re.fullmatch(r"all|no_sink|sink|skip_first:\d+", positions):
        return positions
    hint = did_you_mean(positions, ("no_sink", "sink")) if isinstance(positions, str) else ""
    raise ValueError(f"positions {positions!r}: one of all, no_sink, sink, {{skip_first: n}}{hint}")
