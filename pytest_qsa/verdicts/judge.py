"""An assertion of a suite and a capture → the series that is judged, calibrated or kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..captures.capture import Capture
from ..metrics.series import Series

if TYPE_CHECKING:
    from ..suite.sections import MeasuredAssertion


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
