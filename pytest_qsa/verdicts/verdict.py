"""The result of a judged assertion: a `Verdict` with its rows. Data only: `judge.py` makes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from ..captures import UNKNOWN_RUN, Patch, Provenance
from ..checkpoint import Finding
from ..common import html_table, number
from ..metrics import PlainQuery
from ..suite import Place

MOST_SHOWN = 8
"""The most layers of a verdict that a notebook shows."""


class Kind(StrEnum):
    """A pass, a softened excess, or one of the three kinds of red."""

    PASSED = "PASSED"
    WARNED = "WARNED"
    REGRESSION = "REGRESSION"
    """A bound was exceeded."""
    ANOMALOUS = "ANOMALOUS"
    """Nothing sound was seen, so there is nothing to judge."""
    INFRA = "INFRA"
    """The machine or the installation failed."""


@dataclass(frozen=True)
class Row:
    """One layer (or task, or expert) and its value.

    `low`, `high`: the allowed range. `excess`: the signed distance outside it, 0 inside. `depth`: the index of the
    layer in the model's order. `waived`: a waiver covers the excess. `detail`: more about the value, in words.
    `reference`: the value of the reference at this layer, where it is known. `interval`: 95 % of an estimated value.
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
    interval: tuple[float, float] | None = None

    @property
    def used(self) -> float | None:
        """The used share of the budget: of the bound, or of the allowed distance from the baseline.

        For a lower bound it is bound / value. None where the bounds are 0 or negative.
        """
        if self.baseline is not None:
            if math.isinf(self.baseline):
                return 0.0 if self.value == self.baseline else float("inf")
            allowed = max(abs(bound - self.baseline) for bound in (self.low, self.high) if bound is not None)
            moved = abs(self.value - self.baseline)
            return moved / allowed if allowed else (0.0 if not moved else float("inf"))
        shares = [self.value / self.high] if self.high is not None and self.high > 0 else []
        if self.low is not None and self.low > 0:
            # At or below 0 a lower bound above 0 is missed by any factor.
            shares.append(self.low / self.value if self.value > 0 else float("inf"))
        return max(shares, default=None)

    @property
    def margin(self) -> float:
        """The distance to the nearest bound; negative outside."""
        gaps = [(self.high, self.value), (self.value, self.low)]
        return min(
            # ∞ − ∞ is NaN: two equal infinities have no distance
            (0.0 if end == start else end - start for end, start in gaps if end is not None and start is not None),
            default=math.inf,
        )


@dataclass(frozen=True)
class WaiverUse:
    """What a waiver did to a verdict.

    `layers`: its regex; `until`: its last day, ISO. `state`: `unused` where no layer that it names is out of bounds.
    `covers`: the layers out of bounds that it names.
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
    """A bound in a suite's file and the value that comes nearest to it, for `--qsa-ratchet`.

    `path`, `line`, `key`: where the bound is written. `side`: `max` or `min`.
    """

    path: str
    line: int
    side: str
    key: str
    bound: float
    nearest: float


@dataclass(frozen=True)
class TokenEvidence:
    """A token that explains a value: its location, its text with context, and how far it stands out.

    `magnitude`: its size; `of` names the quantity. `ratio`: magnitude / median. `share`: its part of the total error,
    for a metric against the reference where the error of each token was kept. `decided`, of a prediction: the margin
    by which the reference prefers its token, that token, the margin by which the model prefers another one, and that.
    `answers`, of a prompt: how the reference's answer ends, and how the model's does; `parted`: what each of them
    writes from the token on in which they differ. `patch`, of a picture's token: its row and column, and how many of
    each there are. `picture`: that picture as a data URI.
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
    decided: tuple[str, str, str, str] | None = None
    answers: tuple[str, str] | None = None
    parted: tuple[str, str] | None = None
    patch: Patch | None = None
    picture: str = ""


@dataclass(frozen=True)
class Verdict:
    """The judgement of one assertion on one subject; the terminal, the report and JUnit all draw it.

    `rows`: all layers, worst first. `bound`: the bound in words; `where`: the line that set it. `hints`: what to do
    next, one line each. `updatable`: `--snapshot-update` would accept the change; `accept`: the command that does so.
    `run`: provenance (model, weights, device, dtype, tokens). `since`: what the baseline was made with, and what
    changed since. `histograms`: layer → its distributions, and `curves`: figure → the numbers it is drawn from, both
    for the report's page. `findings`: problems found by a static check, in the order of the layers. `limits`: bounds
    that `--qsa-ratchet` may tighten. `origin`: where a difference from the reference comes from. `told_by`: the id of
    the test that has the whole text of what stopped this one too; empty for a verdict that tells it itself.
    """

    id: str
    subject: str
    kind: Kind
    headline: str
    query: PlainQuery = field(default_factory=PlainQuery)
    rows: Sequence[Row] = ()
    bound: str = ""
    where: Place | None = None
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
    curves: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    waivers: Sequence[WaiverUse] = ()
    limits: Sequence[Limit] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
    told_by: str = ""

    @property
    def failed(self) -> bool:
        """Whether the test fails."""
        return self.kind not in (Kind.PASSED, Kind.WARNED)

    @property
    def failing_rows(self) -> list[Row]:
        """The layers out of bounds that no waiver covers, worst first."""
        return failing(self.rows)

    @property
    def first_failing(self) -> Row | None:
        """The first layer out of bounds in the model's order: where it began."""
        return min(self.failing_rows, key=lambda row: row.depth, default=None)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the headline, and the worst layers in a table."""
        rows = self.failing_rows or self.rows
        caption = f"{self.kind} {self.id}: {self.headline}"
        values = ([row.layer, number(row.value), number(row.excess, signed=True)] for row in rows[:MOST_SHOWN])
        return html_table([["layer", "value", "excess"], *values], caption)


def failing(rows: Sequence[Row]) -> list[Row]:
    """Return the rows out of bounds that no waiver covers, in their order."""
    return [row for row in rows if row.excess and not row.waived]
