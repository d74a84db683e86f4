"""Log-probabilities of a served model: read as tables, and what they prove of its agreement with the reference.

A server returns the likeliest k tokens of each position, not the whole distribution. Row t of a table predicts the
token at t + 1, so that a sample of T tokens has T − 1 rows.

A file is JSON (a list) or JSONL, with an object for each sample in the words of vLLM's own results: `prompt_token_ids`,
a list of T ids, and `prompt_logprobs`, a list of T: null, then for each token a mapping of ids to log-probabilities, as
numbers or as `{"logprob": …}`.

The KL divergence is bounded. Let p be the reference, q the served model, S the tokens that are known of q (and of p),
and P, Q what p and q have outside S. KL(p ‖ q) = Σ_S p ln(p/q) + Σ_∉S p ln(p/q), and of the second sum only P and Q are
known.

*From below.* Putting all tokens outside S into one can't raise a divergence (the data-processing inequality; here the
log-sum inequality, Cover & Thomas, Elements of Information Theory, 2.7.1), so

    KL ≥ Σ_S p ln(p/q) + P ln(P/Q)

with equality where q shares out its rest as p does. *From above.* q may have next to nothing where p has something, so
that nothing finite holds unless something is known of the rest: that ln q is at least f there. Then

    KL ≤ Σ_S p ln(p/q) + Σ_∉S p ln p − f·P

For S the whole vocabulary both are the divergence itself. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..captures import GENERATION, LOGITS, Capture
from ..common import AnomalyError, read_json, shown_path

Floats = NDArray[np.float64]
TOKENS, LOGPROBS = "prompt_token_ids", "prompt_logprobs"
UNLISTED = -1
"""Fills `ids` where a row has fewer tokens than others."""
CERTAIN = 1e-3
"""How far above 1 the sum of a row's probabilities may be, for a server rounds them."""
ROUNDED = 1e-6
"""The error of the sum of a server's probabilities, which are float32. It widens the bounds."""
AT_LEAST, AT_MOST = "at least", "at most"
"""The names of the two sites that hold the ends of the intervals of the site `logits`."""
NOTHING = 1e-12
"""Below this, the probability outside the table is the rounding of a float64 sum, and counts as 0."""


@dataclass(frozen=True, eq=False)
class LogprobTable:
    """The log-probabilities that a server listed for one sample of T tokens.

    `tokens` [T] int32. `ids` [T − 1, k] int32, the likeliest first; `logprobs` [T − 1, k] float64 of them, −∞ where
    absent. `came` [T − 1] float64: of the token that came; NaN where it isn't known.
    """

    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    came: NDArray[np.float64]

    @property
    def least(self) -> int:
        """The smallest number of tokens that a row lists."""
        return int((self.ids != UNLISTED).sum(axis=1).min())


def logprob_table(tokens: Sequence[int], rows: Sequence[Mapping[int, float]], where: str) -> LogprobTable:
    """Make a table of a sample. `rows`: for each of its tokens but the first, token id → log-probability.

    Raises:
        AnomalyError: there are more or fewer rows, a row is empty, or its numbers are no log-probabilities.
    """
    if len(rows) != len(tokens) - 1:
        raise AnomalyError(f"{where}: {len(rows) + 1} positions of logprobs for {len(tokens)} tokens")
    most = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), most), UNLISTED, dtype=np.int32)
    logprobs = np.full((len(rows), most), -np.inf)
    came = np.full(len(rows), np.nan)
    for at, row in enumerate(rows):
        ordered = sorted(row.items(), key=lambda item: -item[1])
        ids[at, : len(ordered)] = [token for token, _ in ordered]
        logprobs[at, : len(ordered)] = [value for _, value in ordered]
        came[at] = row.get(int(tokens[at + 1]), np.nan)
    _check(ids, logprobs, where)
    return LogprobTable(np.asarray(tokens, dtype=np.int32), ids, logprobs, came)


def _check(ids: NDArray[np.int32], logprobs: NDArray[np.float64], where: str) -> None:
    if not len(ids):
        raise AnomalyError(f"{where}: a sample needs two tokens or more, for the first is never predicted")
    bare = np.flatnonzero((ids == UNLISTED).all(axis=1))
    if len(bare):
        raise AnomalyError(f"{where}: there are no logprobs of position {bare[0] + 1}")
    if np.isnan(logprobs).any():
        raise AnomalyError(f"{where}: a logprob of position {np.argwhere(np.isnan(logprobs))[0, 0] + 1} is NaN")
    with np.errstate(over="ignore"):
        sums = np.exp(logprobs).sum(axis=1)
    worst = int(sums.argmax())
    if sums[worst] > 1 + CERTAIN:
        raise AnomalyError(
            f"{where}: the probabilities of position {worst + 1} add up to {sums[worst]:.4g}: these are no "
            "log-probabilities of one distribution (raw logits, or after a sampler); ask the server for raw logprobs"
        )


def read_logprobs(path: Path) -> list[LogprobTable]:
    """Read the samples of a file.

    Raises:
        InfraError: there is no such file, or it can't be read.
        AnomalyError: it is no JSON, has no samples, or one without its tokens or logprobs.
    """
    name, samples = shown_path(path), read_json(path, "logprobs", lines=path.suffix == ".jsonl")
    if not isinstance(samples, list) or not samples:
        raise AnomalyError(f"{name} has no samples: it is a list of objects with {TOKENS} and {LOGPROBS}")
    return [_sample(sample, f"{name}, sample {index}") for index, sample in enumerate(samples)]


def _sample(sample: object, where: str) -> LogprobTable:
    named = sample if isinstance(sample, dict) else {}
    tokens = named.get(TOKENS)
    # By type(), for True is an instance of int.
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise AnomalyError(f"{where} has no {TOKENS}, the list of its ids")
    return logprob_table(tokens, prompt_rows(named.get(LOGPROBS), where), where)


def prompt_rows(positions: object, where: str) -> list[Mapping[int, float]]:
    """Read the logprobs of a prompt as vLLM gives them; the first token has none.

    Raises:
        AnomalyError: they have another form.
    """
    if not isinstance(positions, list) or not positions or positions[0] is not None:
        raise AnomalyError(f"{where}: {LOGPROBS} is a list that begins with null, for nothing predicts the first token")
    return [_row(position, f"{where}, position {at}") for at, position in enumerate(positions[1:], 1)]


def _row(position: object, where: str) -> Mapping[int, float]:
    if not isinstance(position, dict):
        raise AnomalyError(f"{where}: there are no logprobs")
    try:
        return {int(token): number_of(entry) for token, entry in position.items()}
    except (TypeError, ValueError, KeyError):
        raise AnomalyError(f"{where}: the logprobs are no mapping of token ids to numbers") from None


def number_of(entry: object) -> float:
    """Read a log-probability, plain or as `{"logprob": …}`; null is −∞, for JSON has none.

    Raises:
        TypeError: it is no number.
        KeyError: there is none.
    """
    value = entry["logprob"] if isinstance(entry, dict) else entry
    if value is None:
        return float("-inf")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    return float(value)


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
    # −∞ − −∞ would be NaN where a token is known of neither.
    inside = _sum(p, at_known - np.where(p > 0, logprobs, 0.0))
    left = np.clip(1 - np.exp(logprobs).sum(axis=1) + ROUNDED, ROUNDED, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        low = inside + np.where(outside > 0, outside * (np.log(outside) - np.log(left)), 0.0)
        tail = negentropy - _sum(p, at_known)
        high = inside + np.where(outside > 0, tail - _least(floor) * outside, 0.0)
    # A divergence is never negative; rounding may also put the ends in the wrong order.
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
    # Rows with fewer tokens are filled with −∞, which is no token's log-probability.
    least = np.where(np.isfinite(logprobs), logprobs, np.inf).min(axis=1)
    known = ~np.isnan(came)
    low = np.where(known, -came, -np.minimum(least, np.log(left)))
    return Between(low, np.where(known, -came, -_least(floor)))


@dataclass(frozen=True, eq=False)
class ReferenceRows:
    """The reference's predictions for the T − 1 rows of a table of k tokens; all in nats.

    `known` [T − 1, k]: ln p of the table's tokens, −∞ where it has none, or where p isn't known. `came`, `likeliest`
    [T − 1]: ln p of the token that came, NaN where unknown; the likeliest token. `negentropy` [T − 1]: Σ p ln p.
    `margins` [T − 1]: by how much ln p of the likeliest token is above that of the next, NaN where unknown. `nothing`:
    how far Σ p may be from 1 by rounding.
    """

    known: Floats
    came: Floats
    likeliest: NDArray[np.int64]
    negentropy: Floats
    margins: Floats
    nothing: float = NOTHING


@dataclass(frozen=True, eq=False)
class Agreement:
    """The scores of T − 1 positions. `nll`, `kl`: between their bounds; `reference_nll`: NaN for unknown; `same_top`.

    All but `nll` are None without a reference. `overlap`: Σ min(p, q), between its bounds. `margins` [T − 1, 4]:
    `MARGIN_NAMES`; None where some can't be told. `outside` [T − 1]: what the reference has outside the tokens that
    are told.
    """

    nll: Between
    reference_nll: Floats | None = None
    kl: Between | None = None
    same_top: Floats | None = None
    outside: Floats | None = None
    overlap: Between | None = None
    margins: Floats | None = None


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
    p, q = np.exp(rows.known), np.exp(shared)
    inside = np.minimum(p, q).sum(axis=1)
    rest = np.minimum(outside, np.clip(1 - q.sum(axis=1), 0, 1))
    overlap = Between(inside + rest if alike else inside, inside + rest)
    return Agreement(nll, -rows.came, kl, _same_top(table, rows.likeliest), outside, overlap, _margins(table, rows))


def _margins(table: LogprobTable, rows: ReferenceRows) -> Floats | None:
    """Return `MARGIN_NAMES` of each position; None where one can't be told.

    A difference of two log-probabilities is that of their logits. Where the reference's token isn't among the table's,
    the model prefers another one by as much as the table reaches down, or more.
    """
    at = table.ids == rows.likeliest[:, None]
    others = np.where(at, -np.inf, table.logprobs)
    best = others.argmax(axis=1)
    top = others[np.arange(len(best)), best]
    listed = np.where(np.isfinite(table.logprobs), table.logprobs, np.inf).min(axis=1)
    own = np.where(at.any(axis=1), np.where(at, table.logprobs, -np.inf).max(axis=1), listed) - top
    if not np.isfinite(own).all() or np.isnan(rows.margins).any():
        return None
    # A table of equal numbers alone: below 0 all the same, for the token is not among them.
    own = np.where(at.any(axis=1), own, np.minimum(own, -np.finfo(np.float64).tiny))
    written = np.where(own >= 0, rows.likeliest, table.ids[np.arange(len(best)), best])
    return np.stack([rows.margins, own, rows.likeliest, written], axis=1).astype(np.float64)


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
    several = reference.logprobs.shape[1] > 1
    margins = reference.logprobs[:, 0] - reference.logprobs[:, 1] if several else np.full(len(p), np.nan)
    margins = np.where(np.isfinite(margins), margins, np.nan)
    return ReferenceRows(known, reference.came, reference.ids[:, 0].astype(np.int64), negentropy, margins, ROUNDED)


def bounded(capture: Capture) -> tuple[Capture, Capture] | None:
    """Return a capture of the lower ends and one of the upper ends of the intervals; None for any other model."""
    if (AT_LEAST, LOGITS) not in capture.sites:
        return None
    answers = {key: own for key, own in capture.sites.items() if key == (GENERATION, LOGITS)}
    low, high = ({(LOGITS, LOGITS): capture.sites[name, LOGITS], **answers} for name in (AT_LEAST, AT_MOST))
    return replace(capture, sites=low), replace(capture, sites=high)
