"""Series against bounds or a baseline → a `Judgement`: rows, worst first, and a headline. Pure functions, no pytest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np

from ..captures import UNKNOWN_RUN, ModelProvenance, Provenance, match_layers, since_text
from ..checkpoint import Finding
from ..common import number
from ..metrics import Bounds, Query, Series
from ..suite import Location, Waiver
from .baseline_file import BaselineFile, Tolerance, check_comparable, rounded
from .budgets import Budget
from .verdict import Kind, Row, WaiverUse, failing

BASELINE: Location = ("baseline",)
"""The key of an assertion that states its baseline."""


@dataclass(frozen=True)
class Judgement:
    """What came of holding numbers against one bound or baseline; a `Verdict` is made of it.

    `key`: the keys in the suite, below the assertion, that lead to the bound that the worst row is about.
    `run`: the provenance of numbers that no capture holds.
    """

    kind: Kind
    headline: str
    query: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    bound: str = ""
    key: Location = ()
    since: str = ""
    updatable: bool = False
    findings: Sequence[Finding] = ()
    waivers: Sequence[WaiverUse] = ()
    run: Provenance = UNKNOWN_RUN

    @property
    def failed(self) -> bool:
        """Whether a bound was exceeded, or nothing sound was seen."""
        return self.kind not in (Kind.PASSED, Kind.WARNED)


@dataclass(frozen=True)
class Leniency:
    """The waivers of an assertion, as of a day."""

    waivers: Sequence[Waiver] = ()
    today: date = date.min

    def uses(self, rows: Sequence[Row]) -> list[WaiverUse]:
        """Say what each waiver does to the rows."""
        out = [row.layer for row in rows if row.excess]
        return [self._use(waiver, out) for waiver in self.waivers]

    def _use(self, waiver: Waiver, out: Sequence[str]) -> WaiverUse:
        covers = match_layers(out, waiver.layers)
        expired = self.today > waiver.until
        return WaiverUse(
            waiver.layers,
            waiver.owner,
            waiver.reason,
            waiver.until.isoformat(),
            "unused" if not covers else "expired" if expired else "in force",
            covers,
        )


NO_LENIENCY = Leniency()


def within_budget(
    series: Series,
    budget: Budget,
    leniency: Leniency = NO_LENIENCY,
    details: Mapping[str, str] | None = None,
) -> Judgement:
    """Hold every layer of a series against its own bounds.

    `details`: layer → more about its value, in words; the headline repeats that of the worst layer.

    Raises:
        AnomalyError: there is no layer, or a value is not finite.
    """
    series.check()
    rows = [_row(series, depth, own, details=details) for depth, own in enumerate(budget.bounds)]
    judgement = judged(rows, series.query, budget.text, leniency, detailed=bool(details))
    return replace(judgement, key=_exceeded(judgement.rows, budget))


def _row(
    series: Series,
    depth: int,
    bounds: Bounds,
    baseline: float | None = None,
    details: Mapping[str, str] | None = None,
) -> Row:
    """Hold one layer of a series against its bounds; next to a baseline its value is rounded as the baseline is."""
    layer, value = series.layers[depth], float(series.values[depth])
    value = value if baseline is None else rounded(value)
    detail = (details or {}).get(layer) or _interval(series, layer)
    return Row(layer, value, bounds.low, bounds.high, baseline, bounds.excess(value), depth, detail=detail)


def _interval(series: Series, layer: str) -> str:
    """Say how well an estimated value is known; nothing of an exact one."""
    if layer not in series.intervals:
        return ""
    low, high, count = series.intervals[layer]
    return f"95 %: {number(low)} … {number(high)}, from {count} tokens"


def _exceeded(rows: Sequence[Row], budget: Budget) -> Location:
    """Return the keys of the bound that the worst layer exceeds, or comes nearest to; none outside a suite."""
    worst = (failing(rows) or rows)[0]
    names = ("min", "equals", "max") if worst.excess < 0 else ("max", "equals", "min")
    return next((budget.keys[worst.layer, name] for name in names if (worst.layer, name) in budget.keys), ())


def within_baseline(
    series: Series,
    baseline: BaselineFile,
    tolerance: Tolerance,
    data: str | None,
    made_with: ModelProvenance,
    leniency: Leniency = NO_LENIENCY,
) -> Judgement:
    """Hold every layer against its own baseline. `data`: the hash of the present tokens; `made_with`: this model.

    Raises:
        AnomalyError: as `within_budget`.
        BaselineError: another definition, other tokens, or layers that appeared or vanished.
    """
    series.check()
    check_comparable(series, baseline, data)
    rows = []
    for depth, layer in enumerate(series.layers):
        kept = baseline.values[layer]
        rows.append(_row(series, depth, tolerance.bounds(kept), kept))
    since = since_text(baseline.made_with, made_with)
    return replace(judged(rows, series.query, str(tolerance), leniency), key=BASELINE, since=since)


def judged(
    rows: Sequence[Row],
    query: Query,
    bound: str,
    leniency: Leniency = NO_LENIENCY,
    *,
    detailed: bool = False,
) -> Judgement:
    """Sort the rows, let the waivers cover what they name, and word the result.

    `bound`: the bound in words. `detailed`: whether the headline repeats the detail of the worst row.
    """
    rows = sorted(rows, key=lambda row: (-abs(row.excess), -(row.used or 0.0), row.margin))
    uses = leniency.uses(rows)
    covered = {layer for use in uses if use.state == "in force" for layer in use.covers}
    rows = [replace(row, waived=row.layer in covered) for row in rows]
    out, red = [row for row in rows if row.excess], failing(rows)
    kind = Kind.REGRESSION if red else Kind.WARNED if out else Kind.PASSED
    headline = out_of_bounds(rows, red or out, bound, query) if out else _all_within(rows, bound, query)
    if detailed:
        headline += f" ({(red or rows)[0].detail})"
    headline += waiver_notes(uses, out, red)
    updatable = bool(out) and rows[0].baseline is not None
    return Judgement(kind, headline, query.plain(), rows, bound, waivers=uses, updatable=updatable)


def out_of_bounds(rows: Sequence[Row], shown: Sequence[Row], bound: str, query: Query) -> str:
    """Say how many of the rows are out of bounds, and how far the first of those shown, the worst, is."""
    worst = shown[0]
    many = f"{len(shown)} of {len(rows)} {query.of} {'is' if len(shown) == 1 else 'are'}"
    many = many if len(rows) > 1 else f"{worst.layer} is"
    text = f"{many} out of bounds ({bound}); worst {worst.layer}: {number(worst.value)}{_unit(query.unit, worst.value)}"
    text += f", {number(worst.excess, signed=True)}"
    if worst.baseline is not None:
        text += f" beyond what is allowed around {number(worst.baseline)}{_percent(worst)}"
    return text


def _all_within(rows: Sequence[Row], bound: str, query: Query) -> str:
    nearest = rows[0]
    used = f" ({nearest.used:.0%} of what is allowed)" if nearest.used is not None and np.isfinite(nearest.used) else ""
    many = f"{len(rows)} {query.of} within {bound}; nearest {nearest.layer}"
    many = many if len(rows) > 1 else f"{nearest.layer} is within {bound}"
    return f"{many}: {number(nearest.value)}{_unit(query.unit, nearest.value)}{used}"


def _unit(unit: str, value: float) -> str:
    return f" {unit.removesuffix('s') if value == 1 else unit}" if unit else ""


def _percent(row: Row) -> str:
    known = row.baseline and math.isfinite(row.baseline) and math.isfinite(row.value)
    return f" ({(row.value - row.baseline) / abs(row.baseline):+.1%})" if known and row.baseline else ""


def waiver_notes(uses: Sequence[WaiverUse], out: Sequence[Row], red: Sequence[Row]) -> str:
    """Say what is waived of the rows out of bounds, and which waiver expired; nothing where all are within."""
    if not uses or not out:
        return ""
    active = [use for use in uses if use.state == "in force"]
    if not red:
        owners = ", ".join(sorted({use.owner for use in active}))
        return f"; waived until {min(use.until for use in active)} by {owners}"
    notes = [f"{len(out) - len(red)} more are waived"] if len(out) > len(red) else []
    notes += [f"the waiver of {use.owner} expired on {use.until}" for use in uses if use.state == "expired"]
    return "".join(f"; {note}" for note in notes)


def joint_uses(one: Judgement, other: Judgement) -> Sequence[WaiverUse]:
    """Return what each waiver did to two judgements of one assertion: what it covers in either counts."""
    if not one.waivers or not other.waivers:
        return one.waivers or other.waivers
    pairs = zip(one.waivers, other.waivers, strict=True)
    return [first if first.covers else second for first, second in pairs]
