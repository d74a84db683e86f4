"""A served model's table beside what its reference says of the same positions → scores, each between two bounds.

numpy only: the reference's rows come from a pass of the reference, or from a table of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .tables import ABSENT, Table
from .top_tokens import NOTHING, ROUNDED, Between, Floats, kl_bounds, nll_bounds


@dataclass(frozen=True, eq=False)
class ReferenceRows:
    """What a reference says of the T − 1 rows of a table of k tokens; all in nats.

    `known` [T − 1, k]: ln p of the table's tokens, −∞ where it has none, or where p isn't known. `came`, `likeliest`
    [T − 1]: ln p of the token that came, NaN where unknown; the likeliest token. `negentropy` [T − 1]: Σ p ln p.
    `nothing`: up to which Σ p may differ from 1 by rounding.
    """

    known: Floats
    came: Floats
    likeliest: NDArray[np.int64]
    negentropy: Floats
    nothing: float = NOTHING


@dataclass(frozen=True, eq=False)
class Agreement:
    """The scores of T − 1 positions. `nll`, `kl`: between their bounds; `reference_nll`: NaN for unknown; `same_top`.

    All but `nll` are None without a reference. `outside` [T − 1]: what the reference has outside
    the tokens that are told.
    """

    nll: Between
    reference_nll: Floats | None = None
    kl: Between | None = None
    same_top: Floats | None = None
    outside: Floats | None = None


def agreement_of(table: Table, rows: ReferenceRows | None, *, floor: float | None, alike: bool) -> Agreement:
    """Score one sample. `floor`: the least that ln q is outside the table, where it is known.

    `alike`: q is taken to share out its rest as the reference does, so that the lower bound is the divergence.
    """
    nll = nll_bounds(table.came, table.logprobs, floor)
    if rows is None:
        return Agreement(nll)
    shared = np.where(np.isfinite(rows.known), table.logprobs, -np.inf)
    kl = kl_bounds(rows.known, shared, rows.negentropy, floor, rows.nothing)
    outside = np.clip(1 - np.exp(rows.known).sum(axis=1), 0, 1)
    kl = Between(kl.low, kl.low) if alike else kl
    return Agreement(nll, -rows.came, kl, _same_top(table, rows.likeliest), outside)


def _same_top(table: Table, likeliest: NDArray[np.int64]) -> Floats:
    """Return 1 where the reference's likeliest token is one of the table's; a tie is no difference."""
    tops = table.logprobs == table.logprobs.max(axis=1, keepdims=True)
    same: Floats = ((table.ids == likeliest[:, None]) & tops).any(axis=1).astype(np.float64)
    return same


def rows_of_table(reference: Table, table: Table) -> ReferenceRows:
    """Return what a reference says of which only a table is known as well.

    What is outside both is one rest: as the log-sum inequality allows, and for the negative entropy its largest value.
    """
    known = np.full(table.ids.shape, -np.inf)
    for at, (own, theirs) in enumerate(zip(table.ids, reference.ids, strict=True)):
        order = np.argsort(theirs)
        place = np.clip(np.searchsorted(theirs, own, sorter=order), 0, len(order) - 1)
        found = (theirs[order[place]] == own) & (own != ABSENT)
        known[at, found] = reference.logprobs[at, order[place[found]]]
    p = np.exp(known)
    rest = np.clip(1 - p.sum(axis=1), 0, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        negentropy = np.where(p > 0, p * known, 0.0).sum(axis=1) + np.where(rest > 0, rest * np.log(rest), 0.0)
    return ReferenceRows(known, reference.came, reference.ids[:, 0].astype(np.int64), negentropy, ROUNDED)
