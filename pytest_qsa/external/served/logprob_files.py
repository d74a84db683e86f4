"""A file of log-probabilities → tables: what a server said once, kept, so that no server has to run.

JSON (a list) or JSONL, an object for each sample in the words of vLLM's own results: `prompt_token_ids`, a list of T
ids, and `prompt_logprobs`, a list of T: null, then for each token a mapping of ids to log-probabilities, as numbers or
as `{"logprob": …}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...common import AnomalyError, InfraError, shown_path
from .tables import Table, table_of

TOKENS, LOGPROBS = "prompt_token_ids", "prompt_logprobs"


def read_logprobs(path: Path) -> list[Table]:
    """Read the samples of a file.

    Raises:
        InfraError: there is no such file, or it is no JSON.
        AnomalyError: it has no samples, or one without its tokens or logprobs.
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
        raise InfraError(f"{name}: is no JSON: {str(error)[:120]}") from None
    if not isinstance(samples, list) or not samples:
        raise AnomalyError(f"{name} has no samples: it is a list of objects with {TOKENS} and {LOGPROBS}")
    return [_sample(sample, f"{name}, sample {index}") for index, sample in enumerate(samples)]


def _sample(sample: Any, where: str) -> Table:
    tokens = sample.get(TOKENS) if isinstance(sample, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise AnomalyError(f"{where} has no {TOKENS}, the list of its ids")
    return table_of(tokens, rows_of(sample.get(LOGPROBS), where), where)


def rows_of(positions: Any, where: str) -> list[Mapping[int, float]]:
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
