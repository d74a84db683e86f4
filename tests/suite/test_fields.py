"""Sections are strict, and a path of keys leads through them as a suite nests them."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from pytest_qsa.suite.assertion_models import ASSERTIONS
from pytest_qsa.suite.bounds import Noise, Relative, Waiver, Waivers
from pytest_qsa.suite.load import Suite
from pytest_qsa.suite.sections import Regex, Strict, fields_at, section_of


class Inner(Strict):
    """A section."""

    number: float = 0.0
    pattern: Regex = "."


@pytest.mark.parametrize(
    "values", [{"nmber": 1}, {"number": "1"}, {"number": float("nan")}, {"pattern": "x("}], ids=str
)
def test_a_section_refuses_unknown_keys_other_types_and_wrong_patterns(values):
    with pytest.raises(ValidationError):
        Inner(**values)


def test_a_section_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Inner().number = 2.0


@pytest.mark.parametrize(
    ("annotation", "section"),
    [
        (Inner, Inner),
        (Inner | None, Inner),
        (Annotated[Inner | None, Field()], Inner),
        (list[Inner], Inner),
        (dict[str, Inner] | float, Inner),
        (Waivers, Waiver),
        (float, None),
        (Literal["a"], None),
        (list[str] | None, None),
    ],
    ids=[
        "itself",
        "or none",
        "annotated",
        "a list",
        "in a dict",
        "a union with tags",
        "a number",
        "a word",
        "a list of words",
    ],
)
def test_a_section_is_found_through_unions_lists_and_annotations(annotation, section):
    assert section_of(annotation) is section


@pytest.mark.parametrize(
    ("section", "keys", "fields"),
    [
        (Suite, (), Suite.model_fields),
        (Suite, ("model", "served"), ("url", "model", "api")),
        (Suite, ("visualization", "magnitude", "weight"), ("patterns", "reduce_dim")),
        (Suite, ("data", "seed"), ()),
        (ASSERTIONS["absmax"], ("max",), Relative.model_fields),
        (ASSERTIONS["absmax"], ("max", "down_proj$"), Relative.model_fields),
        (ASSERTIONS["absmax"], ("noise", "min", "down_proj$"), Noise.model_fields),
        (ASSERTIONS["absmax"], ("waive", 1), Waiver.model_fields),
        (ASSERTIONS["absmax"], ("baseline",), ("rel", "abs", "direction")),
    ],
)
def test_keys_lead_to_the_fields_of_the_section_that_they_name(section, keys, fields):
    found = fields_at(section, keys)
    assert set(fields) <= set(found)
    assert bool(found) == bool(fields)
