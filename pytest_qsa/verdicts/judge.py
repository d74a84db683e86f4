"""An assertion of a suite and a capture → the series that is judged, calibrated or kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..captures import Capture
from ..metrics import Series

if TYPE_CHECKING:
    from ..suite import MeasuredAssertion


def measured(assertion: MeasuredAssertion, capture: Capture) -> Series:
    """Compute an assertion's series of a capture; there is something in it, and all of it is finite.

    Raises:
        AnomalyError: there is nothing to compute from, or a value is not finite.
    """
    series = series_of(assertion, capture)
    series.check()
    return series


def series_of(assertion: MeasuredAssertion, capture: Capture) -> Series:
    """Compute an assertion's series of a capture, whatever is in it.

    Raises:
        AnomalyError: there is nothing to compute from.
    """
    selection = capture.select(assertion.layers, assertion.site, assertion.exclude)
    series = selection.series(assertion.metric, assertion.reduce, assertion.where, **assertion.parameters)
    return series.folded(assertion.over)
