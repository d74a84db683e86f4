"""Tiers: how often an assertion runs. A run of a tier includes the tiers before it.

The plugin imports this module at every start of pytest, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import pytest

from .. import common

Tier = Literal["pr", "nightly", "release"]
TIERS: tuple[Tier, ...] = get_args(Tier)
"""In order; an assertion without a tier is of the first."""
NOT_RUN = pytest.StashKey[Mapping[str, str]]()
"""In the stash of the configuration: the ids of the tests that the tier leaves out, each with its own tier."""
DESELECTED: pytest.StashKey[dict[str, str]] = pytest.StashKey()
"""In the stash of the configuration: the ids of the gates that something else has deselected, each with that word."""

OTHER_MODEL = "for other models"
"""The word of a gate whose suite says that it is for other models (`models`)."""

REMARKS = pytest.StashKey[Sequence[tuple[str, str]]]()
"""In the stash of the configuration: what a reader has to know of the collection, a line each."""

WORKER_NOT_RUN, WORKER_REMARKS = "qsa_not_run", "qsa_remarks"
"""The same in the output of a worker of pytest-xdist."""
WORKER_COLLECTED = "qsa_collected"
"""In a worker's output: its gates, and where their files lie."""
WORKER_PROBLEM = "qsa_problem"
"""In a worker's output: why it ran nothing."""


def tier_of(item: pytest.Item) -> Tier | None:
    """Return the tier that the nearest mark of a test gives; None for a test that uses nothing of this plugin.

    Raises:
        SuiteError: a mark names an unknown tier.
    """
    marks = list(item.iter_markers("qsa"))
    # Items that are no Python functions have no fixturenames.
    if not marks and "qsa" not in getattr(item, "fixturenames", ()):
        return None
    # iter_markers begins with the nearest mark.
    tier = next((mark.kwargs["tier"] for mark in marks if "tier" in mark.kwargs), TIERS[0])
    if tier not in TIERS:
        raise common.SuiteError(
            f"{item.nodeid}: the mark is wrong: tier '{tier}' is none of {', '.join(TIERS)}"
            f"{common.did_you_mean(str(tier), TIERS)}"
        )
    return tier


def split_by_tier(items: Sequence[pytest.Item], tier: Tier) -> tuple[list[pytest.Item], dict[pytest.Item, Tier]]:
    """Return the tests that a run of a tier includes, and those of later tiers with their tiers.

    Raises:
        SuiteError: as `tier_of`.
    """
    tiers = {item: own for item in items if (own := tier_of(item)) is not None}
    later = {item: own for item, own in tiers.items() if TIERS.index(own) > TIERS.index(tier)}
    # What uses nothing of this plugin has no tier and always runs.
    return [item for item in items if item not in later], later
