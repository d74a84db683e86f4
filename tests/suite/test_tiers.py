"""A run of one tier runs those before it as well, and every test that is no gate."""

from types import SimpleNamespace

import pytest

from pytest_qsa.common import SuiteError
from pytest_qsa.suite import split_by_tier


class Item:
    """As much of a pytest item as a tier is read from; `marks`: the nearest first."""

    def __init__(self, name, *marks, fixtures=()):
        self.nodeid, self.fixturenames = name, fixtures
        self.marks = [SimpleNamespace(kwargs=mark) for mark in marks]

    def iter_markers(self, name):
        assert name == "qsa"
        return iter(self.marks)


ITEMS = [
    Item("plain"),
    Item("gate", {}),
    Item("by fixture", fixtures=("qsa",)),
    Item("nightly", {"tier": "nightly"}),
    Item("release", {"tier": "release"}),
    Item("nearest wins", {"tier": "pr"}, {"tier": "release"}),
    Item("the class says it", {"layers": "x"}, {"tier": "release"}),
]


@pytest.mark.parametrize(
    ("tier", "left_out"),
    [
        ("pr", {"nightly": "nightly", "release": "release", "the class says it": "release"}),
        ("nightly", {"release": "release", "the class says it": "release"}),
        ("release", {}),
    ],
)
def test_later_tiers_are_left_out_and_named(tier, left_out):
    run, later = split_by_tier(ITEMS, tier)
    assert {item.nodeid: own for item, own in later.items()} == left_out
    assert [item.nodeid for item in run] == [item.nodeid for item in ITEMS if item.nodeid not in left_out]


def test_a_tier_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(SuiteError, match=r"a::b: .*'nigthly' is none of pr, nightly, release \(did you mean 'nightly'"):
        split_by_tier([Item("a::b", {"tier": "nigthly"})], "pr")
