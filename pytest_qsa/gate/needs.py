"""What a test announces that it will need: a suite's assertion, or the `qsa` marks of a Python test."""

from __future__ import annotations

from typing import Any

import pytest

from ..captures import ALL_STATISTICS, Massive, Request
from ..common import SuiteError
from ..metrics import METRICS, positions_of
from ..suite import MeasuredAssertion
from .collection import QsaSuite

EVERYTHING = ALL_STATISTICS | {Massive(100.0, 1000.0)}
"""The statistics that a Python test gets where it names no metric."""


def requests_of(item: pytest.Item) -> list[Request]:
    """Return the requests of one item.

    Raises:
        SuiteError: a mark is wrong.
    """
    if isinstance(item.parent, QsaSuite):
        assertion = item.parent.assertion_of(item)
        return [assertion.request] if isinstance(assertion, MeasuredAssertion) else []
    wanted = ((mark.args, {k: v for k, v in mark.kwargs.items() if k != "tier"}) for mark in item.iter_markers("qsa"))
    return [_marked(item, args, keys) for args, keys in wanted if args or keys]


def _marked(item: pytest.Item, args: tuple[object, ...], wanted: dict[str, Any]) -> Request:
    try:
        if args:
            raise SuiteError("layers and site are named: layers=r'…', site='output'")
        layers, site = wanted.pop("layers"), wanted.pop("site")
        exclude, metric = wanted.pop("exclude", None), wanted.pop("metric", None)
        statistics = EVERYTHING
        if metric is not None:
            unknown = set(wanted) - {*METRICS[metric].parameters, "positions"}
            if unknown:
                raise SuiteError(f"{metric} has no parameter {', '.join(sorted(unknown))}")
            statistics = METRICS[metric].needs(site, positions_of(metric, site, wanted.pop("positions", None)), wanted)
        elif wanted:
            raise SuiteError(f"unknown keys {', '.join(wanted)}")
        return Request(layers, site, exclude, statistics)
    except (KeyError, ValueError) as error:
        raise SuiteError(
            f"{item.nodeid}: the mark is wrong: {error}; write @pytest.mark.qsa(layers=r'…', site='output') "
            "with exclude, or metric and its parameters, where needed"
        ) from None
