"""The agreement of a served model with its reference, from its likeliest tokens alone: bounds on the KL divergence.

Let p be the reference, q the served model, S the tokens that are known of q (and of p), and P, Q what p and q have
outside S. KL(p ‖ q) = Σ_S p ln(p/q) + Σ_∉S p ln(p/q), and of the second sum only P and Q are known.

*From below.* Putting all tokens outside S into one can't raise a divergence (the data-processing inequality; here the
log-sum inequality, Cover & Thomas, Elements of Information Theory, 2.7.1), so

    KL ≥ Σ_S p ln(p/q) + P ln(P/Q)

with equality where q shares out its rest as p does. *From above.* q may have next to nothing where p has something, so
that nothing finite holds unless something is known of the rest: that ln q is at least f there. Then

    KL ≤ Σ_S p ln(p/q) + Σ_∉S p ln p − f·P

For S the whole vocabulary both are the divergence itself. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .logprobs import UNLISTED, LogprobTable

Floats = NDArray[np.float64]
ROUNDED = 1e-6
"""The error of the sum of a server's probabilities, which are float32. It widens the bounds."""
NOTHING = 1e-12
"""Below this, the probability outside the table is the rounding of a float64 sum, and counts as 0."""


@dataclass(frozen=True, eq=False)
class Between:
    """An interval for a number at each of T positions: its ends, [T] each."""

    low: Floats
    high: Floats


def kl_bounds(
    at_known: Floats, logprobs: Floats, negentropy: Floats, floor: float | None, nothing: float = NOTHING
) -> Between:
    """Bound KL(p ‖ q) at each position, in nats.

    `at_known` [T, k]: ln p of the tokens that are known of q; `logprobs` [T, k]: ln q of them; both −∞ where absent.
    `negentropy` [T]: Σ p ln p over the vocabulary. `floor`: the least that ln q is outside; None where nothing is
    known. `nothing`: a P up to this is only the rounding of the sum of the others.
    """
    p = np.exp(at_known)
    outside = np.clip(1 - p.sum(axis=1), 0, 1)
    outside = np.where(outside > nothing, outside, 0.0)
    inside = _sum(p, at_known - np.where(p > 0, logprobs, 0.0))
    left = np.clip(1 - np.exp(logprobs).sum(axis=1) + ROUNDED, ROUNDED, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        low = inside + np.where(outside > 0, outside * (np.log(outside) - np.log(left)), 0.0)
        tail = negentropy - _sum(p, at_known)
        high = inside + np.where(outside > 0, tail - _least(floor) * outside, 0.0)
    low = np.maximum(low, 0.0)
    return Between(low, np.maximum(high, low))


def _least(floor: float | None) -> float:
    return -np.inf if floor is None else floor


def _sum(p: Floats, values: Floats) -> Floats:
    """Return Σ p·x of each row; where p = 0 the term is 0, even if x is infinite."""
    with np.errstate(invalid="ignore"):
        products: Floats = np.where(p > 0, p * np.where(p > 0, values, 0.0), 0.0)
    sums: Floats = products.sum(axis=1)
    return sums


def nll_bounds(came: Floats, logprobs: Floats, floor: float | None) -> Between:
    """Bound −ln q of the token that came, [T]; exact where it is known.

    A token that isn't among the likeliest is no likelier than the last of them, and has at most the probability that
    they leave.
    """
    left = np.clip(1 - np.exp(logprobs).sum(axis=1) + ROUNDED, ROUNDED, 1)
    least = np.where(np.isfinite(logprobs), logprobs, np.inf).min(axis=1)
    known = ~np.isnan(came)
    low = np.where(known, -came, -np.minimum(least, np.log(left)))
    return Between(low, np.where(known, -came, -_least(floor)))


@dataclass(frozen=True, eq=False)
class ReferenceRows:
    """The reference's predictions for the T − 1 rows of a table of k tokens; all in nats.

    `known` [T − 1, k]: ln p of the table's tokens, −∞ where it has none, or where p isn't known. `came`, `likeliest`
    [T − 1]: ln p of the token that came, NaN where unknown; the likeliest token. `negentropy` [T − 1]: Σ p ln p.
    `nothing`: how far Σ p may be from 1 by rounding.
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


def agreement_of(table: LogprobTable, rows: ReferenceRows | None, *, floor: float | None, alike: bool) -> Agreement:
    """Score one sample. `floor`: the least that ln q is outside the table, where it is known.

    `alike`: outside the table q is assumed to be proportional to the reference, so that the lower bound is exact.
    """
    nll = nll_bounds(table.came, table.logprobs, floor)
    if rows is None:
        return Agreement(nll)
    shared = np.where(np.isfinite(rows.known), table.logprobs, -np.inf)
    kl = kl_bounds(rows.known, shared, rows.negentropy, floor, rows.nothing)
    outside = np.clip(1 - np.exp(rows.known).sum(axis=1), 0, 1)
    kl = Between(kl.low, kl.low) if alike else kl
    return Agreement(nll, -rows.came, kl, _same_top(table, rows.likeliest), outside)


def _same_top(table: LogprobTable, likeliest: NDArray[np.int64]) -> Floats:
    """Return 1 where the reference's likeliest token is one of the table's; a tie is no difference."""
    tops = table.logprobs == table.logprobs.max(axis=1, keepdims=True)
    same: Floats = ((table.ids == likeliest[:, None]) & tops).any(axis=1).astype(np.float64)
    return same


def rows_of_table(reference: LogprobTable, table: LogprobTable) -> ReferenceRows:
    """Return the rows of a reference of which, too, only a table is known.

    All tokens outside both tables count as one, which the log-sum inequality allows; the negative entropy is then an
    upper bound.
    """
    known = np.full(table.ids.shape, -np.inf)
    for at, (own, theirs) in enumerate(zip(table.ids, reference.ids, strict=True)):
        order = np.argsort(theirs)
        place = np.clip(np.searchsorted(theirs, own, sorter=order), 0, len(order) - 1)
        found = (theirs[order[place]] == own) & (own != UNLISTED)
        known[at, found] = reference.logprobs[at, order[place[found]]]
    p = np.exp(known)
    rest = np.clip(1 - p.sum(axis=1), 0, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        negentropy = np.where(p > 0, p * known, 0.0).sum(axis=1) + np.where(rest > 0, rest * np.log(rest), 0.0)
    return ReferenceRows(known, reference.came, reference.ids[:, 0].astype(np.int64), negentropy, ROUNDED)
