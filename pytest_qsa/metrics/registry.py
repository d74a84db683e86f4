"""What a metric is, and the registry of all: of this package, of conftests and of entry points. numpy only."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..captures import (
    EXPERTS,
    GENERATED,
    LOGITS,
    REFERENCE_SINKS,
    SINKS,
    TOKENS,
    InRange,
    LayerSite,
    PositionRange,
    Site,
    Statistic,
    against_reference,
    names_sinks,
)
from ..common import SuiteError, shown_path

Reduce = Literal["max", "mean", "sum", "p95"]
Per = Literal["layer", "model", "expert", "logits"]
Worst = Literal["highest", "lowest"]
Counts = Literal["positions", "boundaries", "prompts", "samples"]
Values = NDArray[np.float64]
Parameters = Mapping[str, Any]
"""The values of a metric's own parameters, or of a check's, by name."""
Needs = Callable[[Site, str, Parameters], frozenset[Statistic]]
"""Site, positions, parameters → the statistics that a pass has to keep."""

ENTRY_POINTS = "pytest_qsa.metrics"
"""The group of entry points whose modules define metrics."""

ANY = (-math.inf, math.inf)
NOT_NEGATIVE, SHARE = (0.0, math.inf), (0.0, 1.0)
"""What a number can be: any, a count or a size, a share."""
DTYPE_MAX: Mapping[str, float] = {
    "float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": 65504.0,
    "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0,
}  # fmt: skip
"""The largest finite number of each dtype (IEEE 754; OCP OFP8); no model runs in more than float32."""
CONFTEST = "conftest"
"""The origin of the metrics of every conftest.py."""

TWO_SIDED_95 = 1.959963984540054
"""The quantile of the normal distribution for 95 % on both sides: how many standard errors to each end."""

AGGREGATIONS: Mapping[str, Callable[[Values], float]] = {
    "max": lambda values: float(np.max(values)),
    "mean": lambda values: float(np.mean(values)),
    "sum": lambda values: float(np.sum(values)),
    "p95": lambda values: float(np.percentile(values, 95)),
}


@dataclass(frozen=True)
class Estimate:
    """A number that is known from `count` drawn values: within `low` … `high` in 95 of 100 cases.

    Both ends are NaN where too few samples say how far it may be off. `least`: the least that it could have been with
    what it is compared with.
    """

    value: float
    low: float
    high: float
    count: int
    least: float = -math.inf


@dataclass(frozen=True)
class Definition:
    """A plain function under its name; its keyword arguments are its parameters in suites, Python and the schema.

    `origin`: the package or the conftest that defines it; empty for those of this package.
    """

    name: str
    version: int
    compute: Callable[..., Any]
    origin: str = field(default="", kw_only=True)

    @property
    def definition(self) -> str:
        """The id under which a baseline remembers it: `outlier_tokens/1`, of others `origin:name/1`."""
        return f"{self.origin and self.origin + ':'}{self.name}/{self.version}"

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The keyword parameters: name → type and default."""
        # eval_str: in a module with `from __future__ import annotations` the types are strings.
        parameters = inspect.signature(self.compute, eval_str=True).parameters
        return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def file(self) -> str:
        """The file of its function."""
        return self.compute.__code__.co_filename

    @property
    def place(self) -> str:
        """Where its function begins, `file:line`."""
        return f"{shown_path(Path(self.file))}:{self.compute.__code__.co_firstlineno}"


@dataclass(frozen=True)
class Metric(Definition):
    """A metric and what must be known of it before and after the pass.

    `reduce`: how the samples are aggregated by default; None where the metric pools them itself.
    `per`: what one number is about; of a `model` it is computed from the views of all layers, for the `expert`s of a
    layer it is [P, E], for the `logits` the model's prediction is its one site. `statistics`: what a pass has to keep
    for these parameters and positions at this site. `against`: a second model is its reference. `sites`: where it can
    be asked for. `worst`: which of its values is the worst one. `perfect`: its value where nothing is lost, perhaps by
    `stat`, of a metric whose interval must be able to show a bound. `span`: the least and the most that it can be;
    `spans`: the same by `stat`. `counts`: what an estimate is drawn from, perhaps by `stat`.
    `sized`: it is no larger than what it measures.
    """

    reduce: Reduce | None
    tokenwise: bool
    positional: bool
    unit: str
    per: Per
    statistics: Needs
    against: bool
    sites: tuple[Site, ...]
    worst: Worst = field(default="highest", kw_only=True)
    perfect: float | tuple[tuple[str, float], ...] | None = field(default=None, kw_only=True)
    span: tuple[float, float] = field(default=ANY, kw_only=True)
    spans: tuple[tuple[str, tuple[float, float]], ...] = field(default=(), kw_only=True)
    counts: Counts | tuple[tuple[str, Counts], ...] = field(default="positions", kw_only=True)
    sized: bool = field(default=False, kw_only=True)

    def reach(self, over: str | None = None, stat: str = "") -> tuple[float, float]:
        """Return the least and the most that a number of layers, folded by `over`, can be. `stat`: which one."""
        low, high = dict(self.spans).get(stat, self.span)
        return (low if low >= 0 or over != "sum" else -math.inf, high if over != "sum" else math.inf)

    def checks_nothing(
        self, side: Literal["min", "max"], bound: float, over: str | None = None, dtype: str = "float32", stat: str = ""
    ) -> str | None:
        """Return why a bound holds whatever is measured; None where it may not. `dtype`: that of what is measured."""
        low, high = self.reach(over, stat)
        most = dtype if self.sized and over != "sum" else "float32"
        if bound > DTYPE_MAX[most] if side == "max" else bound < -DTYPE_MAX[most]:
            return f"{side} {bound:g} is beyond the largest number of {most}, {DTYPE_MAX[most]:g}, so it checks nothing"
        if side == "max" and bound > high:
            return f"{self.name} is never above {high:g}, so max {bound:g} checks nothing"
        if side == "min" and bound < low:
            return f"{self.name} is never below {low:g}, so min {bound:g} checks nothing"
        return None

    def allows_all(self, tolerance: float) -> str | None:
        """Return why a distance from a baseline holds whatever is measured; None where it may not."""
        low, high = self.span
        if tolerance > min(high - low, DTYPE_MAX["float32"]):
            return f"abs {tolerance:g} is more than {self.name} can differ by, so it checks nothing"
        return None

    def best(self, parameters: Parameters) -> float | None:
        """Return its value where nothing is lost; None where that isn't known."""
        if not isinstance(self.perfect, tuple):
            return self.perfect
        stat = self.parameters["stat"].default
        return dict(self.perfect).get(parameters.get("stat", stat))

    def drawn_from(self, parameters: Parameters) -> Counts:
        """Return what an estimate of it is drawn from."""
        if not isinstance(self.counts, tuple):
            return self.counts
        stat = self.parameters["stat"].default
        return dict(self.counts)[parameters.get("stat", stat)]

    @property
    def of_tokens(self) -> bool:
        """Whether it's taken of tensors that have tokens, so that a range of positions can be chosen."""
        return self.sites != ("weight",) and self.counts not in ("prompts", "samples")

    @cached_property
    def signature(self) -> inspect.Signature:
        """What its method takes: its own parameters in their order, then `reduce` and `positions` where it has them."""
        own = [p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in self.parameters.values()]
        more = ["reduce"] * (self.reduce is not None) + ["positions"] * self.of_tokens
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in more]
        return inspect.Signature([*own, *added])

    def positions_at(self, site: Site) -> str:
        """Return which tokens count by default: against a reference all but the sinks, else all (docs/metrics.md)."""
        return "no_sink" if self.against and self.positional and site != "weight" else "all"

    def refuses(self, site: Site, positions: str, parameters: Parameters) -> str | None:
        """Return why it doesn't take these positions, other than `all`, at a site; None where it does."""
        if site == "weight":
            return f"{self.name} counts no tokens of a weight, so it takes no positions"
        needed, span = self.needs(site, positions, parameters), PositionRange.parse(positions)
        if GENERATED in needed:
            return f"{self.name} counts answers, so it takes no positions"
        if self.counts == "samples":
            return f"{self.name} counts samples, so it takes no positions"
        if span is not None and not span.sinks and site == LOGITS:
            return f"{self.name}: a sink's prediction is one like any other, so it takes no sinks: out"
        if span is not None and not span.sinks and any(isinstance(each, InRange) for each in needed):
            return (
                f"{self.name} is summed up before the sinks are known: begin behind them, from: 4, without sinks: out"
            )
        if span is not None or (self.positional and (self.against or TOKENS in needed)):
            return None
        what = "no tokens with these parameters" if self.positional else "elements, not tokens"
        what = "predictions" if site == LOGITS else what
        return f"{self.name} counts {what}, so it takes no positions but a range, {{from: 4}}"

    def needs(self, site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
        """Return the statistics that a pass has to keep."""
        defaults = {name: p.default for name, p in self.parameters.items()}
        needed = self.statistics(site, positions, {**defaults, **parameters})
        if TOKENS in needed and site != "weight":
            needed |= {SINKS}
        if (span := PositionRange.parse(positions)) is not None:
            needed = frozenset(of for each in needed for of in _within(each, span))
        if self.against and names_sinks(positions) and site != "weight":
            needed |= {REFERENCE_SINKS}
        return needed


def _within(statistic: Statistic, span: PositionRange) -> tuple[Statistic, ...]:
    """Return what has to be kept where a statistic is wanted of a range of positions."""
    if statistic.by_token:
        return (statistic,)
    ranged = InRange(span.start, -1 if span.end is None else span.end, str(statistic))
    # Whoever asks for a layer's experts has its hook look for their routing.
    return (statistic, ranged) if statistic == EXPERTS else (ranged,)


class MetricRegistry(Mapping[str, Metric]):
    """Name → metric. This package's are complete whoever asks first; entry points load when `find` needs them."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}
        self._others: dict[str, Metric] = {}
        self._loaded = self._entry_points_loaded = False

    def add(self, metric: Metric) -> None:
        """Register a metric; that of a module that is imported again takes the place of the earlier one.

        Raises:
            SuiteError: another origin has a metric of this name.
        """
        if not metric.origin:
            self._metrics[metric.name] = metric
            return
        name, other = metric.name, self.get(metric.name)
        # A suite names `external` and the static checks under the same key, although they are no metrics.
        if (other is not None and not other.origin) or name == "external" or name.startswith("checkpoint_"):
            raise SuiteError(f"{metric.place}: '{name}' is a name of pytest-qsa's own: give the metric another one")
        # The same file again is a module that was imported a second time.
        if other is not None and (other.origin, other.file) != (metric.origin, metric.file):
            known = f"{other.origin} ({other.place})"
            raise SuiteError(f"{metric.place}: a metric '{name}' is already defined by {known}: rename one of the two")
        for key, parameter in metric.parameters.items():
            if inspect.Parameter.empty in (parameter.annotation, parameter.default):
                raise SuiteError(f"{metric.place}: the parameter '{key}' of {name} needs a type and a default")
        self._others[name] = metric

    def find(self, name: str) -> Metric | None:
        """Return the metric of that name, from an entry point where nothing else has it; None for an unknown one.

        Raises:
            SuiteError: an entry point can't be loaded, or defines a name that is taken.
        """
        if name not in self and not self._entry_points_loaded:
            self._entry_points_loaded = True  # once: importing a module again would not run its decorators
            for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
                try:
                    point.load()
                except (ImportError, AttributeError) as error:
                    raise SuiteError(
                        f"the entry point '{point.name}' of {ENTRY_POINTS} can't be loaded: {error}"
                    ) from None
        return self.get(name)

    def forget_conftests(self) -> None:
        """Forget what the conftests of a session have defined; the next one in this process has its own."""
        self._others = {name: metric for name, metric in self._others.items() if metric.origin != CONFTEST}

    @property
    def _own(self) -> dict[str, Metric]:
        if not self._loaded:
            self._loaded = True  # first, for the modules look metrics up themselves
            for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
                importlib.import_module(f"{__package__}.{module.name}")
            # In the order of the files, whichever of them was imported first: error messages and the schema list them.
            own = sorted(
                self._metrics.values(), key=lambda metric: (metric.file, metric.compute.__code__.co_firstlineno)
            )
            self._metrics = {metric.name: metric for metric in own}
        return self._metrics

    def __getitem__(self, name: str) -> Metric:
        return self._own[name] if name in self._own else self._others[name]

    def __iter__(self) -> Iterator[str]:
        # This package's come first: a user's metric changes the order of nothing that is listed.
        yield from self._own
        yield from self._others

    def __len__(self) -> int:
        return len(self._own) + len(self._others)


METRICS = MetricRegistry()


def metric(
    statistics: Statistic | Iterable[Statistic | str] | Needs,
    *,
    reduce: Reduce | None = None,
    unit: str = "",
    sites: tuple[Site, ...] = get_args(LayerSite),
    version: int = 1,
    tokenwise: bool = False,
    positional: bool = False,
    per: Per = "layer",
    against: bool = False,
    worst: Worst | None = None,
    perfect: float | Mapping[str, float] | None = None,
    span: tuple[float, float] | Mapping[str, tuple[float, float]] = ANY,
    counts: Counts | Mapping[str, Counts] = "positions",
    sized: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a metric under its own name, for suites and Python alike.

    The function gets a `View` of each layer and its own parameters as keywords, each with a type and a default. It
    returns one number, or, where `reduce` says how samples are aggregated by default, one for each population,
    float64 [P].

    Args:
        statistics: what a pass has to keep for it, as `Statistic` or its text (`"tokens"`, `"massive:100:1000"`), or a
            function of site, positions and parameters that says so.
        reduce: how the populations are aggregated by default: `max`, `mean`, `sum` or `p95`; None for one number.
        unit: of the number, for reports; `dB` lets +∞ pass as nothing that differs.
        sites: where it can be asked for.
        version: of the definition; a baseline of another version is not compared.
        tokenwise: it needs a token axis.
        positional: it counts only the tokens that an assertion's `positions` names; so does each that keeps `tokens`.
        per: what one number is about: a layer, the model, an expert, or the model's logits.
        against: it compares with a reference; so does each whose statistics need one.
        worst: which of its values is the worst one: the `lowest` by default for dB, else the `highest`.
        perfect: its value where nothing is lost, or that of each `stat`. A bound that lies nearer to it than the 95 %
            interval reaches can't be shown by that many tokens, and is refused with the number that would.
        span: the least and the most that it can be, or those of each `stat`; a bound beyond them is refused, for it
            would check nothing.
        counts: what an estimate is drawn from, or that of each `stat`, for messages: positions of the data,
            boundaries among them, prompts, or samples.
        sized: it is no larger than the largest |x| that it measures, as a mean is; a bound beyond the dtype's largest
            number is refused.

    Raises:
        SuiteError: a statistic that there isn't, a name that is taken, or a parameter without type or default; it
            begins with the function's file and line.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        origin = _origin(function)
        needs, kept = _needs(function, statistics)
        logits = per == "logits" or any(statistic.of_logits for statistic in kept)
        METRICS.add(
            Metric(
                function.__name__,
                version,
                function,
                reduce=reduce,
                tokenwise=tokenwise,
                # A metric of this package states it; of another one, `tokens` among its statistics says it.
                positional=positional or tokenwise or bool(origin and TOKENS in kept),
                unit=unit,
                per="logits" if logits else per,
                statistics=needs,
                against=against or bool(against_reference(kept)),
                sites=(LOGITS,) if logits else tuple(sites),
                worst=worst or ("lowest" if unit == "dB" else "highest"),
                # A metric is hashable, and a mapping isn't.
                perfect=tuple(perfect.items()) if isinstance(perfect, Mapping) else perfect,
                span=ANY if isinstance(span, Mapping) else span,
                spans=tuple(span.items()) if isinstance(span, Mapping) else (),
                counts=tuple(counts.items()) if isinstance(counts, Mapping) else counts,
                sized=sized,
                origin=origin,
            )
        )
        return function

    return register


def _origin(function: Callable[..., Any]) -> str:
    """Return who defines a function: `conftest`, or the package that it is in; empty for this one."""
    # A conftest in a package has a dotted name, of which only the last part is `conftest`.
    package, _, _ = function.__module__.partition(".")
    if package == __name__.partition(".")[0]:
        return ""
    return CONFTEST if function.__module__.rpartition(".")[2] == CONFTEST else package


def _needs(
    function: Callable[..., Any], statistics: Statistic | Iterable[Statistic | str] | Needs
) -> tuple[Needs, frozenset[Statistic]]:
    """Return what names the statistics, and those that are known whatever the parameters are."""
    if callable(statistics):
        return statistics, frozenset()
    named = [statistics] if isinstance(statistics, (Statistic, str)) else statistics
    try:
        kept = frozenset(Statistic.parse(each) if isinstance(each, str) else each for each in named)
    except SuiteError as error:
        code = function.__code__
        raise SuiteError(f"{shown_path(Path(code.co_filename))}:{code.co_firstlineno}: {error}") from None
    return lambda site, positions, parameters: kept, kept
