"""Samples that are overlapping windows of one text: by how much each is shifted against the next. numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .capture import Capture
from .requests import Request
from .sites import LOGITS
from .statistics import SHIFTS

LEAST_SHARED = 4
"""Two windows that have fewer tokens in common may do so by chance."""


def with_shifts(capture: Capture, requests: Iterable[Request]) -> Capture:
    """Add to a capture by how much its samples are shifted against each other, for those who ask for it."""
    numbers = capture.sites.get((LOGITS, LOGITS))
    if numbers is None or not any(SHIFTS in request.statistics for request in requests):
        return capture
    own = [capture.tokens[sample] for sample in numbers.sample.tolist()]
    sites = {**capture.sites, (LOGITS, LOGITS): numbers.having((), {SHIFTS.key: shifts_of(own)})}
    return replace(capture, sites=sites)


def shifts_of(samples: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Return by how many tokens each next sample begins later in the text of a sample, [P]; 0 where they share none.

    Special tokens that stand before or after each window aren't text: what all samples begin or end with is left out.
    """
    front, back = _common(samples), _common([row[::-1] for row in samples])
    texts = [row[front : len(row) - back] for row in samples]
    found = [_shift(one, other) for one, other in pairwise(texts)]
    return np.array([*found, 0][: len(samples)], dtype=np.int64)


def _common(samples: Sequence[NDArray[np.int32]]) -> int:
    """Return how many first tokens all samples have in common."""
    shortest = min(map(len, samples), default=0)
    same = np.logical_and.reduce([row[:shortest] == samples[0][:shortest] for row in samples])
    return shortest if same.all() else int(np.argmin(same))


def _shift(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Return the least number of tokens after which a window goes on as another begins, up to its end; 0 for none."""
    last = len(one) - LEAST_SHARED
    if len(other) < LEAST_SHARED or last < 1:
        return 0
    heads = np.lib.stride_tricks.sliding_window_view(one[1:], LEAST_SHARED)
    for start in (np.flatnonzero((heads == other[:LEAST_SHARED]).all(axis=1)) + 1).tolist():
        if np.array_equal(one[start:], other[: len(one) - start]):  # not of one that ends earlier
            return int(start)
    return 0
