"""What a capture has to hold: layers by pattern, plans that merge, and errors that name the nearest layers."""

import pytest

from pytest_qsa.captures import (
    COUNTS,
    TOKENS,
    Capture,
    Request,
    compile_pattern,
    exactly,
    match_layers,
    merge_requests,
    no_match,
)
from pytest_qsa.common import SuiteError

MODULES = ("model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.1.q_proj", "model.layers.10.q_proj", "head")


@pytest.mark.parametrize(
    ("pattern", "exclude", "found"),
    [
        ("q_proj", None, [0, 2, 3]),
        (r"layers\.1\.", None, [2]),
        ("layers.1", None, [2, 3]),
        ("q_proj$", r"\.1", [0]),
        ("^head$", None, [4]),
        (exactly([MODULES[2], "head"]), None, [2, 4]),
        ("x", None, []),
        ("", None, [0, 1, 2, 3, 4]),
    ],
)
def test_a_pattern_finds_layers_in_the_order_of_the_model(pattern, exclude, found):
    assert match_layers(MODULES, pattern, exclude) == [MODULES[index] for index in found]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("(", "is not a regular expression"), ("\bq_proj", "control character"), ("[a-", "is not a regular expression")],
)
def test_a_pattern_that_is_none_is_refused_where_it_is_written(pattern, said):
    with pytest.raises(SuiteError, match=said):
        compile_pattern(pattern)
    with pytest.raises(SuiteError, match=said):
        Request("x", "output", pattern)


def test_an_unknown_site_is_refused():
    with pytest.raises(SuiteError, match="unknown site 'inptu'"):
        Request("x", "inptu")


@pytest.mark.parametrize(
    ("pattern", "exclude", "said"),
    [
        (r"layers\.0\.q_prj$", None, "model.layers.0.q_proj"),
        (r"layers\.\d+\.qproj", None, "model.layers.0.q_proj"),
        ("zzz", None, "model.layers.0.q_proj, model.layers.0.k_proj, model.layers.1.q_proj"),
        ("q_proj", "layers", "exclude 'layers' leaves none"),
    ],
)
def test_a_pattern_that_finds_nothing_names_what_comes_near(pattern, exclude, said):
    assert said in str(no_match(MODULES, pattern, exclude))


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
