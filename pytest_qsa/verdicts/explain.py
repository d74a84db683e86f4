"""A verdict against a reference, explained: whether it differs by design, else where the difference comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from ..captures import Capture
from ..checkpoint import Files, Finding, problems_of
from ..common import InfraError, QsaError
from ..metrics import METRICS
from .origins import origin_of
from .static import by_design
from .verdict import Kind, Verdict

OF_LAYERS = ("checkpoint_scales", "checkpoint_weights", "checkpoint_formats", "checkpoint_keys")
"""The checks that a layer can fail; settings are of the whole checkpoint, and take longer than all of these."""


def diagnosed(
    verdict: Verdict,
    capture: Capture,
    files: Callable[[], Files],
    origins: MutableMapping[Capture, dict[str, str]],
) -> Verdict:
    """Explain a verdict that is out of bounds against a reference; return any other as it is.

    `files`: the checkpoint's, for its static checks; it raises `InfraError` where there is none. `origins`: what has
    been found of each capture, which is the same for all of its verdicts; it is filled here.
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

    if capture not in origins:
        origins[capture] = origin_of(capture, partial(_findings, files))
    return replace(verdict, origin=origins[capture])


def _findings(files: Callable[[], Files], layer: str) -> Sequence[Finding]:
    """Return what the first check that finds something says of a layer and of all below it."""
    for check in OF_LAYERS:
        with suppress(QsaError):  # no files, or nothing there that this check looks at
            if found := problems_of(files(), check, rf"^{re.escape(layer)}(\.|$)")[1]:
                return found
    return ()
