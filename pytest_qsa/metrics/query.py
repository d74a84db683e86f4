"""The query of a metric: its arguments checked, completed with defaults, in canonical form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from ..captures import Site
from ..common import SuiteError, did_you_mean
from .registry import METRICS, REDUCTIONS, Metric, Reduce
from .series import Query

Positions = str | Mapping[str, int]
"""`all`, `no_sink`, `sink` or `{"skip_first": n}`."""


def check_arguments(
    metric: Metric, site: Site, positions: str, reduce: str | None, parameters: Mapping[str, Any]
) -> None:
    """Check what a metric is asked with.

    Raises:
        SuiteError: it doesn't take that.
    """
    for name, value in parameters.items():
        choices = _choices(metric.parameters[name].annotation)
        if choices and value not in choices:
            raise SuiteError(f"{metric.name}: {name} is one of {', '.join(map(str, choices))}, not {value!r}", name)
    if reduce is not None and (metric.reduce is None or reduce not in REDUCTIONS):
        takes = ", ".join(REDUCTIONS) if metric.reduce else "none, for it pools all samples itself"
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
    parameters: Mapping[str, Any],
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
        if set(positions) == {"skip_first"} and isinstance(count, int) and not isinstance(count, bool) and count >= 0:
            return f"skip_first:{count}"
    elif isinstance(positions, str) and re.fullmatch(r"all|no_sink|sink|skip_first:\d+", positions):
        return positions
    hint = did_you_mean(positions, ("no_sink", "sink")) if isinstance(positions, str) else ""
    raise ValueError(f"positions {positions!r}: one of all, no_sink, sink, {{skip_first: n}}{hint}")
