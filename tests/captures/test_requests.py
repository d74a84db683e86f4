"""Requests: plans that merge, and what a capture covers."""

import pytest

from pytest_qsa.captures import (
    COUNTS,
    TOKENS,
    Capture,
    Request,
    merge_requests,
)
from pytest_qsa.common import SuiteError

MODULES = ("model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.1.q_proj", "model.layers.10.q_proj", "head")


def test_an_unknown_site_is_refused():
    with pytest.raises(SuiteError, match="unknown site 'inptu'"):
        Request("x", "inptu")


def test_equal_demands_make_equal_plans():
    tokens, counts = frozenset({TOKENS}), frozenset({COUNTS})
    first = [
        Request("b", "input", None, tokens),
        Request("a", "output", "x", counts),
        Request("b", "input", None, counts),
    ]
    plan = merge_requests(first)
    assert plan == merge_requests(reversed(first)) == merge_requests([*plan, *plan])
    assert plan == (Request("a", "output", "x", counts), Request("b", "input", None, tokens | counts))


@pytest.mark.parametrize(
    ("asked", "covered"),
    [
        (Request("q", "output", None, frozenset({TOKENS})), True),
        (Request("q", "output", None, frozenset({TOKENS, COUNTS})), True),
        (Request("q", "input", None, frozenset({TOKENS})), False),
        (Request("k", "output", None, frozenset({TOKENS})), False),
        (Request("q", "output", "1", frozenset({TOKENS})), False),
        (Request("q", "output"), False),
    ],
)
def test_a_capture_covers_what_was_planned(asked, covered):
    capture = Capture({}, MODULES, plan=(Request("q", "output", None, frozenset({TOKENS, COUNTS})),))
    assert capture.covers([asked]) is covered
