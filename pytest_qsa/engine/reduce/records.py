"""The record of a row's tokens as the kernels write it: one array of the patterns' dtype, [maxima | peaks | channels].

The maxima are signless patterns, one a token that counts; the peaks (which of them are the largest) and the channels
of these are int32, which in an array of 16 bits take two places each and begin at an even one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...captures import padded


def record_size(tokens: int, peaks: int, itemsize: int) -> int:
    """Return the length of a record."""
    return tokens + tokens % 2 + 2 * peaks * 4 // itemsize


def maxima_of(record: NDArray[Any], tokens: int) -> NDArray[Any]:
    """Return the signless patterns, [T]."""
    return record[:tokens]


def peaks_of(record: NDArray[Any], tokens: int) -> NDArray[np.int32]:
    """Return the tokens of the largest maxima, largest first, and their channels, [2, K]."""
    return record[tokens + tokens % 2 :].view(np.int32).reshape(2, -1)


def joined_records(
    records: Sequence[NDArray[Any]], lengths: Sequence[int]
) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int32]]:
    """Return the maxima of all records, [Σ T], and their peaks with the channels of these, [n, K] each; −1 for none."""
    if len({*lengths}) == 1 and len({*map(len, records)}) == 1:
        table = np.stack(records)
        pairs = np.ascontiguousarray(table[:, lengths[0] + lengths[0] % 2 :]).view(np.int32)
        peaks, channels = np.hsplit(pairs, 2)
        return table[:, : lengths[0]].ravel(), peaks.copy(), channels.copy()
    found = [peaks_of(record, length) for record, length in zip(records, lengths, strict=True)]
    maxima = [maxima_of(record, length) for record, length in zip(records, lengths, strict=True)]
    return np.concatenate(maxima), padded([pair[0] for pair in found]), padded([pair[1] for pair in found])
