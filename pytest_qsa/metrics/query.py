"""Query: what a series was asked for, and the check of what a metric is asked with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypedDict, get_args, get_origin

from ..captures import LOGITS, PositionRange, Site
from ..common import SuiteError, did_you_mean
from .registry import AGGREGATIONS, METRICS, Metric, Parameters, Reduce

CHECKPOINT = "checkpoint"
"""The site in the query of a static check, which looks at files and at no tensor stream."""
EVALS = "evals"
"""The site in the query of an external assertion, whose numbers are of tasks and not of layers."""
Over = Literal["sum", "max", "mean"]


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
        if span := PositionRange.parse(self.positions or "all"):
            text += f", {span.text}"
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


Positions = str | Mapping[str, Any]
"""`all`, `no_sink`, `sink`, `{"skip_first": n}`, or a range, `{"from": n, "to": m, "sinks": "out"}`."""


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
    if positions != "all" and (problem := metric.refuses(site, positions, parameters)):
        raise SuiteError(problem, "positions")


def _choices(annotation: Any) -> list[Any]:
    """Return the values of a Literal, or of a union with one; nothing for a type that is open."""
    arms = get_args(annotation)
    if get_origin(annotation) is Literal:
        return list(arms)
    of_arms = [[None] if arm is type(None) else _choices(arm) for arm in arms]
    # `float | None` takes any number.
    return [choice for choices in of_arms for choice in choices] if all(of_arms) else []


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
        positions if definition.positional or positions != "all" else None,
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
    """Return `all`, `no_sink`, `sink`, `skip_first:n` or a range as `PositionRange` writes it.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(positions, Mapping):
        if {"from", "to"} & set(positions):
            return str(_range_of(positions))
        count = positions.get("skip_first")
        if set(positions) == {"skip_first"} and _is_count(count):
            return f"skip_first:{count}"
    elif isinstance(positions, str):
        span = PositionRange.parse(positions)
        if re.fullmatch(r"all|no_sink|sink|skip_first:\d+", positions) or (span and _holds_some(span)):
            return positions
    hint = did_you_mean(positions, ("no_sink", "sink")) if isinstance(positions, str) else ""
    raise ValueError(f"positions {positions!r}: one of all, no_sink, sink, {{skip_first: n}}, {{from: n, to: m}}{hint}")


def _range_of(positions: Mapping[str, Any]) -> PositionRange:
    keys = ("from", "to", "sinks")
    for key in positions:
        if key not in keys:
            raise ValueError(f"positions: a range has from, to and sinks, not {key!r}{did_you_mean(str(key), keys)}")
    start, end, sinks = positions.get("from", 0), positions.get("to"), positions.get("sinks", "in")
    for key, count in (("from", start), ("to", end)):
        if not (_is_count(count) or (key == "to" and count is None)):
            raise ValueError(f"positions: {key} is a number of tokens, 0 or more, not {count!r}")
    if sinks not in ("in", "out"):
        raise ValueError(f"positions: sinks is in or out, not {sinks!r}")
    span = PositionRange(start, end, sinks == "in")
    if not _holds_some(span):
        raise ValueError(f"positions: to {end} is not above from {start}, so no token counts")
    return span


def _is_count(value: object) -> bool:
    # bool is a subclass of int.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _holds_some(span: PositionRange) -> bool:
    return span.end is None or span.end > span.start
