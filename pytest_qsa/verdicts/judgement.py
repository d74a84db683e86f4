"""A series of numbers against bounds → a `Judgement`: rows, worst first, and a headline. No pytest here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING

import numpy as np

from ..captures import LOGITS, UNKNOWN_RUN, Capture, Provenance, match_layers
from ..checkpoint import Finding
from ..common import AnomalyError, number
from ..external import bounded
from ..metrics import (
    LEAST_BOUNDARIES,
    LEAST_WINDOWS,
    METRICS,
    TWO_SIDED_95,
    Bounds,
    NotMeasuredError,
    PlainQuery,
    Query,
    Series,
)
from ..suite import Location, Waiver
from .budgets import Budget, budget_of
from .verdict import Kind, Row, WaiverUse, failing

if TYPE_CHECKING:
    from ..suite import MeasuredAssertion


@dataclass(frozen=True)
class Judgement:
    """What came of holding numbers against one bound or baseline; a `Verdict` is made of it.

    `key`: the keys in the suite, below the assertion, that lead to the bound that the worst row is about.
    `run`: the provenance of numbers that no capture holds. `told_by`: see `Verdict`.
    """

    kind: Kind
    headline: str
    query: PlainQuery = field(default_factory=PlainQuery)
    rows: Sequence[Row] = ()
    bound: str = ""
    key: Location = ()
    since: str = ""
    updatable: bool = False
    findings: Sequence[Finding] = ()
    waivers: Sequence[WaiverUse] = ()
    run: Provenance = UNKNOWN_RUN
    told_by: str = ""

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
        # The last day still counts.
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
PLAIN_FACTOR = 1.5
"""From this multiple of a baseline, up or down, a change is told as a factor; a smaller one as a percentage."""


def within_budget(
    series: Series,
    budget: Budget,
    leniency: Leniency = NO_LENIENCY,
    details: Mapping[str, str] | None = None,
) -> Judgement:
    """Hold every layer of a series that has a bound against it.

    `details`: layer → more about its value, in words; the headline repeats that of the worst layer.

    Raises:
        AnomalyError: there is no layer, or a value is not finite.
    """
    series.check()
    _check_shown(series, budget)
    rows = [row for row in _rows(series, budget, details or {}) if (row.low, row.high) != (None, None)]
    judgement = judged(rows, series.query, budget.text, leniency, detailed=bool(details))
    free = len(series.layers) - len(rows)
    headline = (
        f"{judgement.headline}; {free} more {'has' if free == 1 else 'have'} no bound" if free else judgement.headline
    )
    return replace(judgement, headline=headline, key=_exceeded(judgement.rows, budget))


def unbounded(series: Series) -> Judgement:
    """Return the numbers of a series that is held against nothing, in the model's order.

    Raises:
        AnomalyError: there is no layer, or a value is not finite.
    """
    series.check()
    rows = list(_rows(series, Budget.of(Bounds(), series.layers), {}))
    return Judgement(Kind.PASSED, f"{series.query.metric} of {len(rows)} {series.query.of}", series.query.plain(), rows)


def _rows(series: Series, budget: Budget, details: Mapping[str, str]) -> Iterator[Row]:
    """Yield the row of each layer."""
    values = zip(series.layers, budget.bounds, series.values.tolist(), strict=True)
    for depth, (layer, bounds, value) in enumerate(values):
        detail = details.get(layer) or interval_text(series, layer)
        interval = series.intervals[layer][:2] if layer in series.intervals else None
        excess = bounds.excess(value)
        yield Row(layer, value, bounds.low, bounds.high, None, excess, depth, detail=detail, interval=interval)


def interval_text(series: Series, layer: str) -> str:
    """Say how well an estimated value is known, in words; empty for an exact one."""
    if layer not in series.intervals:
        return ""
    low, high, count = series.intervals[layer]
    metric = METRICS.get(series.query.metric)
    counts = metric.drawn_from(series.query.parameters) if metric else "positions"
    words = {"positions": ("tokens", "samples"), "prompts": ("prompts", "of them"), "samples": ("samples", "of them")}
    drawn, of = words.get(counts, (counts, "samples"))
    if math.isnan(low):
        return f"from {count} {drawn}; fewer than {LEAST_WINDOWS} {of} give no interval"
    return f"95 %: {number(low)} … {number(high)}, from {count} {drawn}"


def _check_shown(series: Series, budget: Budget) -> None:
    """Refuse a bound that lies nearer to a perfect value than the interval of the measured one reaches.

    A value whose whole interval is out of bounds has shown that; so has one without an interval to judge by.

    Raises:
        AnomalyError: with the number of tokens that it would take.
    """
    definition = METRICS.get(series.query.metric)
    perfect = definition.best(series.query.parameters) if definition is not None else None
    if definition is None or perfect is None:
        return
    for layer, bounds, value in zip(series.layers, budget.bounds, series.values.tolist(), strict=True):
        low, high, count = series.intervals.get(layer, (value, value, 0))
        bound = bounds.low if bounds.low is not None else bounds.high
        if bounds.low is not None and bounds.low <= (least := series.least.get(layer, -math.inf)):
            raise AnomalyError(
                f"{series.query.metric} can't be less than {number(least)} here, for the reference has no more to "
                f"lose, so min {bounds.low:g} checks nothing: give a higher bound, more tokens "
                "(generation.max_new_tokens) or other prompts"
            )
        if bound is None or math.isnan(low) or (bounds.excess(low) and bounds.excess(high)):
            continue
        reach, room = max(value - low, high - value), abs(perfect - bound)
        if reach <= room:
            continue
        drawn = definition.drawn_from(series.query.parameters)
        what = f"{count:,} {drawn} can't show that {series.query.metric} is {budget.text}"
        if not room:
            raise AnomalyError(f"{what}, nor can any number: leave some room for chance")
        # Wilson's interval of a perfect share shrinks with the count, any other one with its root.
        needed = count * (reach / room) ** (1 if value == perfect else 2)
        enough = f"about {float(f'{needed:.2g}'):,.0f} would, {needed / count:.1f} × as many (data.num_samples)"
        if drawn == "prompts":  # those that count may be some of them
            enough = f"about {needed / count:.1f} × as many would (generation.num_prompts)"
        raise AnomalyError(
            f"{what}: by chance alone it may be off by {number(reach)}; {enough}, or give the bound more room"
        )


def positions_needed(assertion: MeasuredAssertion) -> int | None:
    """Return the fewest positions that could show a bound, where nothing at all is lost; None where that isn't asked.

    By Wilson's interval, as `_check_shown` asks it: z² / (n + z²) of a perfect share is no more than the bound's room.
    """
    definition = METRICS[assertion.metric]
    perfect = definition.best(assertion.parameters) if definition.counts != "samples" else None
    bounds = [bound for bound in assertion.stated.values() if isinstance(bound, float)]
    scale = 1000 if assertion.parameters.get("stat") == "spurious" else 1
    rooms = [abs(perfect - bound) / scale for bound in bounds] if perfect is not None else []
    room = min(rooms, default=1.0)
    if not 0 < room < 1:
        return None
    needed = math.ceil(TWO_SIDED_95**2 * (1 - room) / room)
    boundaries = METRICS[assertion.metric].drawn_from(assertion.parameters) == "boundaries"
    return max(needed, LEAST_BOUNDARIES) if boundaries else needed


def _exceeded(rows: Sequence[Row], budget: Budget) -> Location:
    """Return the keys of the bound that the worst layer exceeds, or comes nearest to; none outside a suite."""
    worst = (failing(rows) or rows)[0]
    # The side that is missed comes first; within bounds (0) the upper one.
    names = ("min", "equals", "max") if worst.excess < 0 else ("max", "equals", "min")
    return next((budget.keys[worst.layer, name] for name in names if (worst.layer, name) in budget.keys), ())


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
    # Within bounds the worst used most of its budget; where a bound has no share (0, negative), it is nearest.
    rows = sorted(rows, key=lambda row: (-abs(row.excess), -(row.used or 0.0), row.margin))
    uses = leniency.uses(rows)
    covered = {layer for use in uses if use.state == "in force" for layer in use.covers}
    rows = [replace(row, waived=True) if row.layer in covered else row for row in rows]
    out, red = [row for row in rows if row.excess], failing(rows)
    kind = Kind.REGRESSION if red else Kind.WARNED if out else Kind.PASSED
    headline = out_of_bounds(rows, red or out, bound, query) if out else _all_within(rows, bound, query)
    if detailed:
        headline += f" ({(red or rows)[0].detail})"
    headline += waiver_notes(uses, out, red)
    updatable = bool(out) and rows[0].baseline is not None
    return Judgement(kind, headline, query.plain(), rows, bound, waivers=uses, updatable=updatable)


def out_of_bounds(rows: Sequence[Row], shown: Sequence[Row], bound: str, query: Query) -> str:
    """Say where the worst of the rows shown is and by how much, then how many of the rows are out of bounds."""
    worst = shown[0]
    value = f"{number(worst.value)}{_unit(query.unit, worst.value)}"
    if worst.baseline is not None:
        against = f"baseline {number(worst.baseline)}, allowed {bound.removeprefix('baseline ')}"
        text = f"{worst.layer}: {factor_text(worst)} ({value}, {against})"
    else:
        text = f"{worst.layer}: {value} ({_own_bound(worst) if '{' in bound else bound})"
    if len(rows) == 1:
        return f"{text}, out of bounds"
    return f"{text}; {len(shown)} of {len(rows)} {query.of} {'is' if len(shown) == 1 else 'are'} out of bounds"


def _own_bound(row: Row) -> str:
    """Say the bound of one layer, where a suite states one for each group."""
    sides = (("min", row.low), ("max", row.high))
    return ", ".join(f"{side} {number(bound)}" for side, bound in sides if bound is not None)


def factor_text(row: Row) -> str:
    """Say how far a value is from its baseline: `× 2`, `+12.5 %`, or the difference where a share means nothing."""
    baseline = row.baseline
    assert baseline is not None
    if not baseline or not math.isfinite(baseline) or not math.isfinite(row.value):
        return f"{number(row.value - baseline, signed=True)}" if math.isfinite(row.value - baseline) else "moved"
    ratio = row.value / baseline
    if ratio >= PLAIN_FACTOR or 0 < ratio <= 1 / PLAIN_FACTOR:
        return f"× {ratio:.3g}"
    return f"{(row.value - baseline) / abs(baseline):+.1%}".replace("-", "−").replace("%", " %")


def _all_within(rows: Sequence[Row], bound: str, query: Query) -> str:
    nearest = rows[0]
    used = f" ({nearest.used:.0%} of what is allowed)" if nearest.used is not None and np.isfinite(nearest.used) else ""
    many = f"{len(rows)} {query.of} within {bound}; nearest {nearest.layer}"
    many = many if len(rows) > 1 else f"{nearest.layer} is within {bound}"
    return f"{many}: {number(nearest.value)}{_unit(query.unit, nearest.value)}{used}"


def _unit(unit: str, value: float) -> str:
    return f" {unit.removesuffix('s') if value == 1 else unit}" if unit else ""


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
    # Both judgements are of one assertion, and list its waivers in one order.
    pairs = zip(one.waivers, other.waivers, strict=True)
    return [first if first.covers else second for first, second in pairs]


def checked_series(assertion: MeasuredAssertion, capture: Capture) -> Series:
    """Compute an assertion's series from a capture: it has at least one layer, and all values are finite.

    Raises:
        AnomalyError: there is nothing to compute from, or a value is not finite.
    """
    series = series_of(assertion, capture)
    series.check()
    return series


def series_of(assertion: MeasuredAssertion, capture: Capture) -> Series:
    """Compute an assertion's series from a capture; it may be empty or not finite.

    Raises:
        AnomalyError: there is nothing to compute from.
    """
    selection = capture.select(assertion.layers, assertion.site, assertion.exclude)
    series = selection.series(assertion.metric, assertion.reduce, assertion.where, **assertion.parameters)
    return series.folded(assertion.over)


def settled(assertion: MeasuredAssertion, capture: Capture) -> tuple[Capture, str]:
    """Return the capture to judge an assertion by, and how well its number is known, in words.

    A served model gives an interval for each number. A `max` fails if the lower end exceeds it, and holds if the upper
    end is within it.

    Raises:
        AnomalyError: the bound lies inside the interval, so that nothing is proved; or the assertion is on layers.
    """
    pair = bounded(capture)
    if pair is None:
        return capture, ""
    if assertion.site != LOGITS:
        raise AnomalyError(
            f"{assertion.metric} is measured at layers, and a served model tells of its predictions only: give the "
            "checkpoint, model.path or --qsa-model"
        )
    try:
        # An end is infinite where nothing is known of the tokens that the server does not list.
        with np.errstate(invalid="ignore", over="ignore"):
            series = [series_of(assertion, each) for each in pair]
    except NotMeasuredError:
        raise AnomalyError(
            f"{assertion.metric} needs the probability of every token, and a served model tells of its likeliest ones "
            "only: gate kl_divergence or same_top, or give the checkpoint, model.path or --qsa-model"
        ) from None
    values = [float(np.nan_to_num(each.values[0], nan=np.inf, posinf=np.inf, neginf=-np.inf)) for each in series]
    if values[0] == values[1]:
        return pair[0], _assumed(assertion, capture)
    low, high = min(values), max(values)
    between = f"between {number(low)} and {_number(high)}{_outside(capture)}"
    decides = None if assertion.metric in ("delta_p", "growth") else _deciding(assertion, series[0], low, high)
    if decides is None:
        raise AnomalyError(
            f"{assertion.metric} is {between}; that decides nothing. Ask for more (served.top_logprobs; vLLM allows "
            "it by --max-logprobs), say what may be assumed of the rest (model.tail), or gate ln_ppl_ratio and same_top"
        )
    return pair[values.index(decides)], between


def _deciding(assertion: MeasuredAssertion, series: Series, low: float, high: float) -> float | None:
    """Return the end of the interval that decides: both ends are out on one side, or both are within; else None."""
    if not assertion.stated or assertion.follows or assertion.baseline is not None:
        return None
    (bounds,) = budget_of(assertion.stated, series.layers, None).bounds
    least, most = bounds.excess(low), bounds.excess(high)
    if least > 0 and most > 0:
        return low
    if least < 0 and most < 0:
        return high
    return (high if bounds.high is not None else low) if least == most == 0 else None


def _number(value: float) -> str:
    return "∞" if value == float("inf") else number(value)


def _outside(capture: Capture) -> str:
    served = capture.provenance.model.served
    if served is None or served.outside is None:
        return ""
    return f": {served.logprobs} tokens of a position are told, and the reference has {served.outside:.3%} outside"


def _assumed(assertion: MeasuredAssertion, capture: Capture) -> str:
    """Say what was assumed of the tokens that the server didn't list, for `tail: as_reference`."""
    served = capture.provenance.model.served
    if assertion.metric != "kl_divergence" or served is None or served.tail != "as_reference":
        return ""
    return f"at least; the rest is taken to be shared out as the reference's{_outside(capture)}"
