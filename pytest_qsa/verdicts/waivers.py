"""Waivers: a known excess, softened until its day. They never touch a verdict that saw nothing sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date

from ..captures import match_layers
from ..suite import Waiver
from .verdict import Kind, Row, Verdict, WaiverUse, out_of_bounds


def apply_waivers(verdict: Verdict, waivers: Sequence[Waiver], today: date) -> Verdict:
    """Soften what the waivers cover, and say what each of them did; a verdict without rows stays as it is."""
    if not waivers or verdict.kind not in (Kind.REGRESSION, Kind.PASSED):
        return verdict
    out = [row.layer for row in verdict.rows if row.excess]
    uses = [_use(waiver, out, today) for waiver in waivers]
    covered = {layer for use in uses if use.state == "in force" for layer in use.covers}
    rows = [replace(row, waived=row.layer in covered) for row in verdict.rows]
    verdict = replace(verdict, rows=rows, waivers=uses)
    return _reworded(verdict, rows, covered) if out else verdict


def _use(waiver: Waiver, out: Sequence[str], today: date) -> WaiverUse:
    covers = match_layers(out, waiver.layers)
    state = "unused" if not covers else "in force" if today <= waiver.until else "expired"
    return WaiverUse(waiver.layers, waiver.owner, waiver.reason, waiver.until.isoformat(), state, covers)  # type: ignore[arg-type]


def joint_uses(one: Verdict, other: Verdict) -> list[WaiverUse]:
    """Return what each waiver did to two verdicts of one assertion: what it covers in either counts."""
    if not one.waivers or not other.waivers:
        return [*(one.waivers or other.waivers)]
    pairs = zip(one.waivers, other.waivers, strict=True)
    return [first if first.covers else second for first, second in pairs]


def _reworded(verdict: Verdict, rows: Sequence[Row], covered: set[str]) -> Verdict:
    """Say in the headline what is waived, and what no longer is."""
    failing = [row for row in rows if row.excess and not row.waived]
    if not failing:
        until = min(use.until for use in verdict.waivers if use.state == "in force")
        owners = ", ".join(sorted({use.owner for use in verdict.waivers if use.state == "in force"}))
        return replace(verdict, kind=Kind.WARNED, headline=f"{verdict.headline}; waived until {until} by {owners}")
    headline = verdict.headline
    if covered and not verdict.findings:
        headline = out_of_bounds(
            rows, failing, verdict.bound, verdict.query.get("unit", ""), verdict.query.get("of", "layers")
        )
    headline += f"; {len(covered)} more are waived" if covered else ""
    expired = [f"the waiver of {use.owner} expired on {use.until}" for use in verdict.waivers if use.state == "expired"]
    return replace(verdict, headline="; ".join([headline, *expired]))
