"""Log-probabilities of a served model → tables, from a file of what a server answered, or from its answers.

A server tells the likeliest k tokens of each position, not the whole distribution. Row t of a table predicts the token
at t + 1, so that a sample of T tokens has T − 1 rows.

A file is JSON (a list) or JSONL, with an object for each sample in the words of vLLM's own results: `prompt_token_ids`,
a list of T ids, and `prompt_logprobs`, a list of T: null, then for each token a mapping of ids to log-probabilities, as
numbers or as `{"logprob": …}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import AnomalyError, InfraError, shown_path

UNLISTED = -1
"""Fills `ids` where a row has fewer tokens than others."""
CERTAIN = 1e-3
"""How far above 1 the sum of a row's probabilities may be, for a server rounds them."""


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


TOKENS, LOGPROBS = "prompt_token_ids", "prompt_logprobs"


def read_logprobs(path: Path) -> list[LogprobTable]:
    """Read the samples of a file.

    Raises:
        InfraError: there is no such file, or it can't be read.
        AnomalyError: it is no JSON, has no samples, or one without its tokens or logprobs.
    """
    name = shown_path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        samples = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else (
            json.loads(text)
        )  # fmt: skip
    except FileNotFoundError:
        raise InfraError(f"{name}: there is no such file of logprobs") from None
    except OSError as error:
        raise InfraError(f"{name}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise AnomalyError(f"{name}: is no JSON: {str(error)[:120]}") from None
    if not isinstance(samples, list) or not samples:
        raise AnomalyError(f"{name} has no samples: it is a list of objects with {TOKENS} and {LOGPROBS}")
    return [_sample(sample, f"{name}, sample {index}") for index, sample in enumerate(samples)]


def _sample(sample: Any, where: str) -> LogprobTable:
    tokens = sample.get(TOKENS) if isinstance(sample, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise AnomalyError(f"{where} has no {TOKENS}, the list of its ids")
    return logprob_table(tokens, prompt_rows(sample.get(LOGPROBS), where), where)


def prompt_rows(positions: Any, where: str) -> list[Mapping[int, float]]:
    """Read the logprobs of a prompt as vLLM gives them; the first token has none.

    Raises:
        AnomalyError: they have another form.
    """
    if not isinstance(positions, list) or not positions or positions[0] is not None:
        raise AnomalyError(f"{where}: {LOGPROBS} is a list that begins with null, for nothing predicts the first token")
    return [_row(position, f"{where}, position {at}") for at, position in enumerate(positions[1:], 1)]


def _row(position: Any, where: str) -> Mapping[int, float]:
    if not isinstance(position, dict):
        raise AnomalyError(f"{where}: there are no logprobs")
    try:
        return {int(token): number_of(entry) for token, entry in position.items()}
    except (TypeError, ValueError, KeyError):
        raise AnomalyError(f"{where}: the logprobs are no mapping of token ids to numbers") from None


def number_of(entry: Any) -> float:
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
