"""Tables of log-probabilities: what a served model tells of each position of a prompt. numpy only.

A server tells the likeliest k tokens, not the whole distribution. Row t of a table is the prediction of the token at
t + 1, so that a sample of T tokens has T − 1 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...common import AnomalyError

ABSENT = -1
"""Stands in `ids` where a row has fewer tokens than others."""
CERTAIN = 1e-3
"""A logarithm of a probability, or of the sum of some, may be above 0 by so much, for it was rounded."""


@dataclass(frozen=True, eq=False)
class Table:
    """What is known of one sample of T tokens.

    `tokens` [T] int32. `ids` [T − 1, k] int32, the likeliest first; `logprobs` [T − 1, k] float64 of them, −∞ where
    absent. `came` [T − 1] float64: of the token that came; NaN where it isn't known.
    """

    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    came: NDArray[np.float64]

    @property
    def least(self) -> int:
        """How many tokens are told of each row, or more."""
        return int((self.ids != ABSENT).sum(axis=1).min())


def table_of(tokens: Sequence[int], rows: Sequence[Mapping[int, float]], where: str) -> Table:
    """Make a table of a sample. `rows`: for each of its tokens but the first, token id → log-probability.

    Raises:
        AnomalyError: there are more or fewer rows, a row is empty, or its numbers are no log-probabilities.
    """
    if len(rows) != len(tokens) - 1:
        raise AnomalyError(f"{where}: {len(rows) + 1} positions of logprobs for {len(tokens)} tokens")
    most = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), most), ABSENT, dtype=np.int32)
    logprobs = np.full((len(rows), most), -np.inf)
    came = np.full(len(rows), np.nan)
    for at, row in enumerate(rows):
        ordered = sorted(row.items(), key=lambda item: -item[1])
        ids[at, : len(ordered)] = [token for token, _ in ordered]
        logprobs[at, : len(ordered)] = [value for _, value in ordered]
        came[at] = row.get(int(tokens[at + 1]), np.nan)
    _check(ids, logprobs, where)
    return Table(np.asarray(tokens, dtype=np.int32), ids, logprobs, came)


def _check(ids: NDArray[np.int32], logprobs: NDArray[np.float64], where: str) -> None:
    if not len(ids):
        raise AnomalyError(f"{where}: a sample needs two tokens or more, for the first is never predicted")
    bare = np.flatnonzero((ids == ABSENT).all(axis=1))
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
