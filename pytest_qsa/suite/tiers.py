"""Tiers: how often an assertion is worth its time. A run of one tier runs those before it as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import pytest

from ..common import SuiteError, did_you_mean

Tier = Literal["pr", "nightly", "release"]
TIERS: tuple[Tier, ...] = get_args(Tier)
"""In their order; an assertion that names none is of the first."""
NOT_RUN = pytest.StashKey[Mapping[str, str]]()
"""On the configuration: the id of each gate that the tier left out → its own tier."""

WORKER_NOT_RUN = "qsa_not_run"
"""The key of an xdist worker's output that holds the same."""
WORKER_PROBLEM = "qsa_problem"
"""The key of its output that says why it ran nothing."""


def tier_of(item: pytest.Item) -> Tier | None:
    """Return the tier of a gate, the nearest mark's; None for a test that is no gate.

    Raises:
        SuiteError: a mark names no tier.
    """
    marks = list(item.iter_markers("qsa"))
    if not marks and "qsa" not in getattr(item, "fixturenames", ()):
        return None
    tier = next((mark.kwargs["tier"] for mark in marks if "tier" in mark.kwargs), TIERS[0])
    if tier not in TIERS:
        raise SuiteError(
            f"{item.nodeid}: the mark is wrong: tier '{tier}' is none of {', '.join(TIERS)}"
            f"{did_you_mean(str(tier), TIERS)}"
        )
    return tier


def split_by_tier(items: Sequence[pytest.Item], tier: Tier) -> tuple[list[pytest.Item], dict[pytest.Item, Tier]]:
    """Return what a run of a tier runs, and the gates of later tiers with theirs.

    Raises:
        SuiteError: as `tier_of`.
    """
    tiers = {item: own for item in items if (own := tier_of(item)) is not None}
    later = {item: own for item, own in tiers.items() if TIERS.index(own) > TIERS.index(tier)}
    return [item for item in items if item not in later], later
