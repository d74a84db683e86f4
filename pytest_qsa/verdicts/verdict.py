"""A series against a budget or a baseline → a Verdict. Plain functions over plain data; no pytest, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from ..captures import UNKNOWN_RUN, ModelProvenance, Provenance, since_text
from ..checkpoint import Finding
from ..common import BaselineError, QsaError, number
from ..metrics import Bounds, Query, Series
from .baseline_file import BaselineFile, rounded


class Kind(StrEnum):
    """What a verdict is: a pass, a softened excess, or one of the three kinds of red (design.md, decision 9)."""

    PASSED = "PASSED"
    WARNED = "WARNED"
    REGRESSION = "REGRESSION"
    ANOMALOUS = "ANOMALOUS"
    INFRA = "INFRA"


@dataclass(frozen=True)
class Tolerance:
    """How far from its baseline a layer may be: max(abs, rel·|baseline|); `up` and `down` forbid one direction only."""

    rel: float = 0.0
    abs: float = 0.0
    direction: str = "both"

    def __post_init__(self) -> None:
        if self.direction not in ("both", "up", "down"):
            raise ValueError(f"direction '{self.direction}': one of both, up, down")
        if not (self.rel >= 0 and self.abs >= 0):
            raise ValueError(f"rel={self.rel:g}, abs={self.abs:g}: a tolerance is 0 or more")

    def bounds(self, baseline: float) -> Bounds:
        """Return what a layer with this baseline may be; where that is ∞ nothing finite is near it."""
        if math.isinf(baseline):
            return Bounds(None if self.direction == "up" else baseline, None if self.direction == "down" else baseline)
        allowed = max(self.abs, self.rel * abs(baseline))
        low = None if self.direction == "up" else baseline - allowed
        high = None if self.direction == "down" else baseline + allowed
        return Bounds(low, high)

    def __str__(self) -> str:
        """Write it as a suite does: `baseline ± 5 %`."""
        parts = [f"{self.rel * 100:.3g} %"] if self.rel else []
        parts += [f"{self.abs:g}"] if self.abs or not self.rel else []
        sign = {"both": "±", "up": "+", "down": "−"}[self.direction]
        return f"baseline {sign} {' or '.join(parts)}"


@dataclass(frozen=True)
class Row:
    """One layer under judgement. `low`, `high`: what it may be; `excess`: by how much it is out, with its sign.

    `depth`: its place in the model's order, among the layers of this assertion. `waived`: a waiver covers its excess.
    `detail`: what the value was made of, in words. `reference`: what the reference has there, where that is known.
    """

    layer: str
    value: float
    low: float | None
    high: float | None
    baseline: float | None
    excess: float
    depth: int = 0
    waived: bool = False
    detail: str = ""
    reference: float | None = None

    @property
    def used(self) -> float | None:
        """The share of the budget that is used: of the bound, or of the allowed distance from the baseline.

        Of a lower bound it is the bound over the value. None where the bounds are 0 or below.
        """
        if self.baseline is not None:
            if math.isinf(self.baseline):
                return 0.0 if self.value == self.baseline else float("inf")
            allowed = max(abs(bound - self.baseline) for bound in (self.low, self.high) if bound is not None)
            moved = abs(self.value - self.baseline)
            return moved / allowed if allowed else (0.0 if not moved else float("inf"))
        shares = [self.value / self.high] if self.high is not None and self.high > 0 else []
        if self.low is not None and self.low > 0:
            shares.append(self.low / self.value if self.value > 0 else float("inf"))
        return max(shares, default=None)

    @property
    def room(self) -> float:
        """How far the nearest bound is; below 0 where it is exceeded."""
        gaps = [(self.high, self.value), (self.value, self.low)]
        return min(
            (0.0 if end == start else end - start for end, start in gaps if end is not None and start is not None),
            default=math.inf,
        )


@dataclass(frozen=True)
class WaiverUse:
    """A waiver, and what it did here: `in force`, `expired`, or `unused` where no layer that it names is out of bounds.

    `layers`: the regex; `until`: an ISO date; `covers`: the layers out of bounds that it names.
    """

    layers: str
    owner: str
    reason: str
    until: str
    state: Literal["in force", "expired", "unused"]
    covers: Sequence[str] = ()

    def __str__(self) -> str:
        """Write it in one line."""
        what = f"{self.state}, until {self.until}, {self.owner}: {self.reason}"
        return f"{what} ({', '.join(self.covers[:3])}{', …' if len(self.covers) > 3 else ''})" if self.covers else what


@dataclass(frozen=True)
class Limit:
    """A number of a suite that bounds layers, and the value that comes nearest to it. `side`: `max` or `min`.

    `path`, `line`, `key`: where it stands.
    """

    path: str
    line: int
    side: str
    key: str
    bound: float
    nearest: float


@dataclass(frozen=True)
class TokenEvidence:
    """A token behind a value: where it is, what it says (with its neighbours), and how far it stands out.

    `of`: what its `magnitude` is, of which `ratio` is the multiple of the median. `share`: of the error of all tokens
    that count, where the value is one against the reference and each token's error was kept.
    """

    layer: str
    sample: int
    position: int
    text: str
    before: str
    after: str
    magnitude: float
    ratio: float
    channel: int
    sink: bool
    call: int = 0
    of: str = "|x|"
    share: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The judgement of one assertion on one subject; the terminal, the report and JUnit all draw this.

    `rows`: all layers, worst first. `bound`: the bound in words, `where`: the file:line that set it. `hints`: what to
    do next, one line each. `updatable`: `--snapshot-update` would accept the change. `run`: what was run
    (model, weights, device, dtype, tokens). `since`: what the baseline was made with, and what is other now.
    `histograms`: layer → its distributions, for the report.
    `findings`: what a static check found, in the layers' order. `waivers`: what each waiver of the assertion did.
    `limits`: what `--qsa-ratchet` may tighten. `origin`: where a difference from the reference comes from.
    """

    id: str
    subject: str
    kind: Kind
    headline: str
    query: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    bound: str = ""
    where: str = ""
    reason: str | None = None
    positions: str | None = None
    sinks: str = ""
    evidence: Sequence[TokenEvidence] = ()
    hints: Sequence[str] = ()
    run: Provenance = UNKNOWN_RUN
    command: str = ""
    accept: str = ""
    artefacts: Mapping[str, str] = field(default_factory=dict)
    updatable: bool = False
    since: str = ""
    histograms: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    waivers: Sequence[WaiverUse] = ()
    limits: Sequence[Limit] = ()
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the test fails."""
        return self.kind not in (Kind.PASSED, Kind.WARNED)

    @property
    def failing_rows(self) -> list[Row]:
        """The layers out of bounds that no waiver covers, worst first."""
        return [row for row in self.rows if row.excess and not row.waived]

    @property
    def first_failing(self) -> Row | None:
        """The first layer out of bounds in the model's order: where it began."""
        return min(self.failing_rows, key=lambda row: row.depth, default=None)


def judge_bounds(series: Series, bounds: Bounds | Sequence[Bounds], text: str = "") -> Verdict:
    """Hold every layer against one budget, or each against its own. `text`: the budgets in words.

    Raises:
        AnomalyError: there is no layer, or a value is not finite.
    """
    series.check()
    budgets = [bounds] * len(series.layers) if isinstance(bounds, Bounds) else bounds
    values = enumerate(zip(series.layers, series.values.tolist(), budgets, strict=True))
    rows = [
        Row(layer, value, own.low, own.high, None, own.excess(value), depth, detail=_interval(series, layer))
        for depth, (layer, value, own) in values
    ]
    return _judged(series, rows, text or str(budgets[0]))


def _interval(series: Series, layer: str) -> str:
    """Say how well an estimated value is known, nothing of an exact one."""
    if layer not in series.intervals:
        return ""
    low, high, count = series.intervals[layer]
    return f"95 %: {number(low)} … {number(high)}, from {count} tokens"


def judge_baseline(
    series: Series, baseline: BaselineFile, tolerance: Tolerance, data: str | None, made_with: ModelProvenance
) -> Verdict:
    """Hold every layer against its own baseline. `data`: the hash of the present tokens; `made_with`: this model.

    Raises:
        AnomalyError: as `judge_bounds`.
        BaselineError: another definition, other tokens, or layers that appeared or vanished.
    """
    series.check()
    check_comparable(series, baseline, data)
    rows = []
    for depth, (layer, exact) in enumerate(zip(series.layers, series.values.tolist(), strict=True)):
        value, kept = rounded(exact), baseline.values[layer]
        allowed = tolerance.bounds(kept)
        excess, detail = allowed.excess(value), _interval(series, layer)
        rows.append(Row(layer, value, allowed.min, allowed.max, kept, excess, depth, detail=detail))
    return replace(_judged(series, rows, str(tolerance)), since=since_text(baseline.made_with, made_with))


def check_comparable(series: Series, baseline: BaselineFile, data: str | None) -> None:
    """Check that a baseline is of the same definition, tokens and layers as a series.

    Raises:
        BaselineError: it is not; the text says what differs.
    """
    now = BaselineFile.of(series, data)
    if now.query != baseline.query:
        changed = [
            key for key in sorted({*now.query, *baseline.query}) if now.query.get(key) != baseline.query.get(key)
        ]
        first = changed[0]
        raise BaselineError(
            f"the baseline was made with another {first}: {baseline.query.get(first)!r}, now {now.query.get(first)!r}, "
            "so the numbers can't be compared"
        )
    if baseline.data != now.data and series.query.site != "weight":
        raise BaselineError(
            f"the baseline was made on other tokens ({_short(baseline.data)}, now {_short(now.data)}): data, "
            "tokenizer, seed, num_samples or seq_len changed, so the numbers can't be compared"
        )
    gone = [layer for layer in baseline.values if layer not in series.layers]
    new = [layer for layer in series.layers if layer not in baseline.values]
    if gone or new:
        parts = [f"{len(names)} {word} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})" for word, names in
                 (("vanished", gone), ("appeared", new)) if names]  # fmt: skip
        raise BaselineError(f"the layers differ from the baseline's: {'; '.join(parts)}")


def _short(fingerprint: str | None) -> str:
    return (fingerprint or "none").removeprefix("sha256:")[:12]


def _judged(series: Series, rows: list[Row], bound: str) -> Verdict:
    rows = sorted(rows, key=lambda row: (-abs(row.excess), -(row.used or 0.0), row.room))
    failing = [row for row in rows if row.excess]
    worst = rows[0]
    if failing:
        text = out_of_bounds(rows, failing, bound, series.query.unit, series.query.of)
        positions, updatable = series.query.positions, worst.baseline is not None
        return Verdict(
            "", "", Kind.REGRESSION, text, series.query.plain(), rows, bound, positions=positions, updatable=updatable
        )  # fmt: skip
    unit = _unit(series.query.unit, worst.value)
    used = f" ({worst.used:.0%} of what is allowed)" if worst.used is not None and np.isfinite(worst.used) else ""
    many = f"{len(rows)} {series.query.of} within {bound}; nearest {worst.layer}"
    many = many if len(rows) > 1 else f"{worst.layer} is within {bound}"
    text = f"{many}: {number(worst.value)}{unit}{used}"
    return Verdict("", "", Kind.PASSED, text, series.query.plain(), rows, bound, positions=series.query.positions)


def out_of_bounds(rows: Sequence[Row], failing: Sequence[Row], bound: str, unit: str, of: str = "layers") -> str:
    """Say how many of the rows fail, and how far the worst, the first, is out of bounds. `of`: layers or tasks."""
    worst = failing[0]
    many = f"{len(failing)} of {len(rows)} {of} {'is' if len(failing) == 1 else 'are'}"
    many = many if len(rows) > 1 else f"{worst.layer} is"
    text = f"{many} out of bounds ({bound}); worst {worst.layer}: {number(worst.value)}{_unit(unit, worst.value)}"
    text += f", {number(worst.excess, signed=True)}"
    if worst.baseline is not None:
        text += f" beyond what is allowed around {number(worst.baseline)}{_percent(worst)}"
    return text


def _unit(unit: str, value: float) -> str:
    return f" {unit.removesuffix('s') if value == 1 else unit}" if unit else ""


def _percent(row: Row) -> str:
    known = row.baseline and math.isfinite(row.baseline) and math.isfinite(row.value)
    return f" ({(row.value - row.baseline) / abs(row.baseline):+.1%})" if known and row.baseline else ""


def anomaly(error: QsaError, query: Query | None = None) -> Verdict:
    """Turn an error into the verdict of the assertion that it stopped."""
    kind = Kind(error.kind) if error.kind in Kind.__members__ else Kind.INFRA
    asked = query.plain() if query else {}
    return Verdict("", "", kind, str(error), asked, updatable=isinstance(error, BaselineError))


def accepted(series: Series, text: str, bound: str) -> Verdict:
    """Return the verdict of a baseline that was made anew."""
    return Verdict("", "", Kind.PASSED, text, series.query.plain(), bound=bound)


def detailed(verdict: Verdict, detail: str) -> Verdict:
    """Say of a verdict's one row what its value was made of; nothing, for nothing."""
    if not detail:
        return verdict
    rows = [replace(row, detail=detail) for row in verdict.rows]
    return replace(verdict, rows=rows, headline=f"{verdict.headline} ({detail})")


def softened(verdict: Verdict, level: str) -> Verdict:
    """Apply `level: warn`: an exceeded bound becomes a warning; an assertion that saw nothing still fails."""
    if level == "warn" and verdict.kind is Kind.REGRESSION:
        return replace(verdict, kind=Kind.WARNED)
    return verdict
