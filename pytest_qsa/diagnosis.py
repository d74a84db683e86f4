"""A verdict against a reference, explained: whether it differs by design, else where the difference comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from .assertions import Kind, Verdict
from .captures import Capture
from .checkpoint import Files, problems_of
from .checkpoint.judging import by_design
from .errors import InfraError, QsaError
from .findings import Finding
from .metrics import METRICS
from .origins import origin_of


def diagnosed(verdict: Verdict, capture: Capture, files: Callable[[], Files]) -> Verdict:
    """Explain a verdict that is out of bounds against a reference; return any other as it is.

    `files`: the checkpoint's, for its static checks; it raises `InfraError` where there is none.
    """
    metric = METRICS.get(verdict.query.get("metric", ""))
    if metric is None or not metric.against or capture.reference is None:
        return verdict
    if verdict.kind not in (Kind.REGRESSION, Kind.WARNED):
        return verdict
    if metric.per != "logits":
        with suppress(InfraError):  # a model of a fixture or a factory has no files to tell by
            verdict = by_design(verdict, files().relation, capture.blocks)
    if verdict.kind is Kind.ANOMALOUS:
        return verdict

    def findings_at(layer: str) -> Sequence[Finding]:
        try:
            return problems_of(files(), "checkpoint_health", rf"^{re.escape(layer)}(\.|$)")[1]
        except QsaError:
            return ()

    return replace(verdict, origin=origin_of(capture, findings_at))
