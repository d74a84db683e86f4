"""Patterns: which layers they find, what none may cost, and the error that names the nearest layers."""

import re
import time

import pytest

from pytest_qsa.captures import (
    Request,
    check_pattern,
    exactly,
    found_by,
    match_layers,
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
    [
        ("(", "is not a regular expression"),
        ("\bq_proj", "control character"),
        ("[a-", "is not a regular expression"),
        ("*.down_proj", r"a glob's \* is \.\* here"),
        ("x{99999999999}", "is not a regular expression"),
        ("(" * 500 + ")" * 500, "is not a regular expression"),
        ("((a{100}|b)+c){101}", "repeats a part 10,100 times"),
    ],
)
def test_a_pattern_that_is_none_is_refused_where_it_is_written(pattern, said):
    with pytest.raises(SuiteError, match=said):
        check_pattern(pattern)
    with pytest.raises(SuiteError, match=said):
        Request("x", "output", pattern)


def test_a_pattern_of_a_suite_has_at_most_a_thousand_characters():
    assert check_pattern("x" * 1000)
    with pytest.raises(SuiteError, match=r"^the regex 'x{40}…' has 1,001 characters; at most 1,000$"):
        check_pattern("x" * 1001)


@pytest.mark.parametrize(
    "pattern", [r"^(\w|\w\w)+[.!]$", r"(.*)(.*)(.*)(.*)\1\2\3\4[xz]", "(a|aa)*[!x]$|" + "b" * 1000]
)
def test_a_pattern_that_would_take_years_is_stopped(pattern):
    began = time.process_time()
    with pytest.raises(
        SuiteError, match=r"takes more than 0\.1 s for the names: write it without a repeat in a repeat"
    ):
        found_by(pattern, ["a" * 60] * 1000, seconds=0.1)
    assert time.process_time() - began < 2


# What the package `regex` alone reads as syntax: fuzzy counts, and sets of POSIX.
@pytest.mark.parametrize(
    "pattern",
    ["(?:q_proj){e<=1}", "q{e}", "a{}", r"q\{e\}", r"[q\[]_", "[]q]_", r"[^\]q]_", r"\N{DIGIT ZERO}", "l{2,}"],
)
def test_patterns_mean_what_they_mean_to_python(pattern):
    names = [*MODULES, "kk_proj", "q{e}", "(?:q_proj){e<=1}", "q_proj{e<=1}", "a{}", "[_", "]_", "all"]
    assert match_layers(names, pattern) == [name for name in names if re.search(pattern, name)]


def test_the_pattern_of_thousands_of_names_finds_each_of_them():
    names = [f"model.layers.{index}.q_proj" for index in range(3000)]
    assert match_layers([*names, "x"], exactly(names)) == names


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
