"""The record of a row's tokens as the kernels write it: one array of the patterns' dtype, [maxima | peaks | channels].

The maxima are signless patterns, one a token that counts; the peaks (which of them are the largest) and the channels
of these are int32, which in an array of 16 bits take two places each and begin at an even one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def record_size(tokens: int, peaks: int, itemsize: int) -> int:
    """Return the length of a record."""
    return tokens + tokens % 2 + 2 * peaks * 4 // itemsize


def maxima_of(record: NDArray[Any], tokens: int) -> NDArray[Any]:
    """Return the signless patterns, [T]."""
    return record[:tokens]


def peaks_of(record: NDArray[Any], tokens: int) -> NDArray[np.int32]:
    """Return the tokens of the largest maxima, largest first, and their channels, [2, K]."""
    return record[tokens + tokens % 2 :].view(np.int32).reshape(2, -1)


def split_records(records: Sequence[NDArray[Any]], lengths: Sequence[int]) -> dict[str, list[NDArray[Any]]]:
    """Return the parts of each record by the names that they have in a capture."""
    pairs = [peaks_of(record, length) for record, length in zip(records, lengths, strict=True)]
    return {
        "token_max": [maxima_of(record, length) for record, length in zip(records, lengths, strict=True)],
        "peaks": [pair[0] for pair in pairs],
        "peak_channels": [pair[1] for pair in pairs],
    }
