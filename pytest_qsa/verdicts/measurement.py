"""An assertion and a capture → the series to judge; for a served model, the end of its interval that decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..captures import LOGITS, Capture
from ..common import AnomalyError, number
from ..external import bounded
from ..metrics import NotMeasuredError, Series
from .budgets import budget_of

if TYPE_CHECKING:
    from ..suite import MeasuredAssertion


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
        with np.errstate(invalid="ignore", over="ignore"):
            series = [series_of(assertion, each) for each in pair]
    except NotMeasuredError:
        raise AnomalyError(
            f"{assertion.metric} needs the probability of every token, and a served model tells of its likeliest ones "
            "only: gate kl_divergence or same_top, or give the checkpoint, model.path or --qsa-model"
        ) from None
    values = [_value(each) for each in series]
    if values[0] == values[1]:
        return pair[0], _assumed(assertion, capture)
    low, high = min(values), max(values)
    between = f"between {number(low)} and {_number(high)}{_outside(capture)}"
    decides = None if assertion.metric == "delta_p" else _deciding(assertion, series[0], low, high)
    if decides is None:
        raise AnomalyError(
            f"{assertion.metric} is {between}; that decides nothing. Ask for more (served.top_logprobs; vLLM allows "
            "it by --max-logprobs), say what may be assumed of the rest (model.tail), or gate ln_ppl_ratio and same_top"
        )
    return pair[values.index(decides)], between


def _value(series: Series) -> float:
    value = float(series.values[0])
    return float("inf") if np.isnan(value) else value


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
