"""What the reference has at the layers that a verdict is about, set beside the model's own values. Plain functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..captures import LOGITS, SINKS, Capture, Provenance, exactly
from ..common import QsaError
from ..metrics import METRICS, Metric
from .verdict import Verdict


def beside_reference(verdict: Verdict, capture: Capture) -> Verdict:
    """Give each row the reference's own value, as far as the pass kept what it needs (its block outputs' tokens).

    A metric that compares with the reference has none: there the value itself is the distance.
    """
    query, reference = verdict.query, capture.reference
    metric, site = METRICS.get(query.get("metric", "")), query.get("site", LOGITS)
    if reference is None or metric is None or metric.against or query.get("over") or site == LOGITS:
        return verdict
    held = [row.layer for row in verdict.rows if _known(reference, row.layer, metric, query)]
    if not held or (query["positions"] in ("sink", "no_sink") and not reference.sinks.searched):
        return verdict
    try:
        series = reference.select(exactly(held), site).series(
            query["metric"], query["reduce"], query["positions"] or "all", **query["parameters"]
        )
    except QsaError:  # it is shown beside the model's, never judged
        return verdict
    values = dict(zip(series.layers, series.values.tolist(), strict=True))
    return replace(verdict, rows=[replace(row, reference=values.get(row.layer)) for row in verdict.rows])


def _known(reference: Capture, layer: str, metric: Metric, query: Mapping[str, Any]) -> bool:
    numbers = reference.sites.get((layer, query["site"]))
    if numbers is None or not numbers.populations or not numbers.token_axis:
        return False
    return metric.needs(query["site"], query["positions"] or "all", query["parameters"]) <= numbers.statistics | {SINKS}


def provenance_of(capture: Capture) -> Provenance:
    """Return where the numbers come from, with the model that the reference's come from."""
    if capture.reference is None:
        return capture.provenance
    return replace(capture.provenance, reference=capture.reference.provenance.model)
