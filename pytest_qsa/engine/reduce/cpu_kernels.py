"""Fused reductions for the CPU, compiled by numba: what torch's operators need several passes and copies for.

All work is on bit patterns. With the sign bit cleared, the pattern of a float orders as its magnitude does, so that a
maximum of magnitudes is a maximum of integers, and a 16-bit value is its own bin. `torch_ops.py` does the same with
torch's operators: on accelerators, without numba, and as the tests' oracle.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from numba import config, njit, prange, set_num_threads

SIGNLESS16, SIGNLESS32 = np.uint16(0x7FFF), np.uint32(0x7FFFFFFF)

compiled = njit(cache=True, nogil=True, boundscheck=False)
parallel = njit(cache=True, nogil=True, boundscheck=False, parallel=True)


def share_torchs_threads() -> int:
    """Let the kernels that this thread calls next run on as many threads as torch has; return how many.

    More threads would compete with torch's for the cores. Setting numba's number may set torch's as well, where both
    use one OpenMP runtime; it is then restored.
    """
    before = torch.get_num_threads()
    if getattr(_shared, "threads", None) == before:
        return before
    count = min(before, config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    set_num_threads(count)
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
    _shared.threads = count
    return int(count)


_shared = threading.local()
"""`threads`: what numba was last given in this thread. To ask numba costs more than a small tensor's reduction."""


@parallel
def channel_maxima(patterns, maxima):
    """Raise maxima [threads, C] to the largest signless pattern of each column of a share of patterns [T, C]."""
    kind = patterns.dtype.type
    signless = kind((1 << (8 * patterns.itemsize - 1)) - 1)
    threads = maxima.shape[0]
    share = (patterns.shape[0] + threads - 1) // threads
    for thread in prange(threads):
        largest = maxima[thread]
        for token in range(thread * share, min((thread + 1) * share, patterns.shape[0])):
            row = patterns[token]
            for channel in range(row.shape[0]):
                largest[channel] = max(largest[channel], kind(row[channel] & signless))


@parallel
def count_channels(patterns, counts, threads, shift, first, codes):
    """Count float32 patterns [T, C] into counts [2 · codes, C], whose bins captures/distributions.py defines.

    Each thread takes a share of the channels.
    """
    share = (patterns.shape[1] + threads - 1) // threads
    for thread in prange(threads):
        for token in range(patterns.shape[0]):
            for channel in range(thread * share, min((thread + 1) * share, patterns.shape[1])):
                pattern = patterns[token, channel]
                code = np.int64((pattern & SIGNLESS32) >> np.uint32(shift)) - first
                code = min(max(code, 0), codes - 1)
                counts[code + codes * np.int64(pattern >> np.uint32(31)), channel] += np.uint32(1)


@compiled
def order_of(row, low, values, ranks, ascending, order):
    """Fill order [R] with the magnitudes at ranks [R] from a row's counts. ascending [R]: the order of the ranks."""
    seen = 0
    rank = 0
    for column in range(row.shape[1]):
        seen += row[0, column] + row[1, column]
        while rank < ranks.shape[0] and seen > ranks[ascending[rank]]:
            order[ascending[rank]] = values[0 if column == 0 else low + column - 1]
            rank += 1


@compiled
def signed_ends(row, low, values):
    """Return the smallest and the largest x from the counts of a row; NaN if there is one."""
    last = row.shape[1] - 1
    if last and np.isnan(values[low + last - 1]):
        return np.nan, np.nan
    return -_largest(row[1], row[0], low, values), _largest(row[0], row[1], low, values)


@compiled
def _largest(plus, minus, low, values):
    for column in range(plus.shape[0] - 1, 0, -1):
        if plus[column]:
            return values[low + column - 1]
    if plus[0] or minus[0]:
        return 0.0
    column = 1
    while not minus[column]:
        column += 1
    return -values[low + column - 1]


@compiled
def moments_of_counts(row, low, values, moments):
    """Fill moments [`MOMENT_NAMES`] from the counts of a row; exact but for the rounding of float64."""
    count = 0.0
    total = 0.0
    nonfinite = 0
    for column in range(row.shape[1]):
        plus, minus = np.int64(row[0, column]), np.int64(row[1, column])
        if plus + minus:
            value = values[0 if column == 0 else low + column - 1]
            count += plus + minus
            total += (plus - minus) * value
            if not np.isfinite(value):
                nonfinite += plus + minus
    # A second loop, about the mean: raw sums of fourth powers would cancel.
    mean = total / count
    m2 = 0.0
    m4 = 0.0
    for column in range(row.shape[1]):
        value = values[0 if column == 0 else low + column - 1]
        for sign in range(2):
            if row[sign, column]:
                square = ((value if sign == 0 else -value) - mean) ** 2
                m2 += row[sign, column] * square
                m4 += row[sign, column] * square * square
    moments[0], moments[1], moments[2], moments[3] = count, mean, m2, m4
    moments[4] = values[low + row.shape[1] - 2] if row.shape[1] > 1 else 0.0
    moments[5], moments[6] = np.int64(row[0, 0]) + np.int64(row[1, 0]), nonfinite


@compiled
def moments_of_values(x, moments):
    """Fill moments [n, mean, m2, m4, zeros, nonfinite] of x [N], summed in float64."""
    total = 0.0
    zeros = 0
    nonfinite = 0
    for index in range(x.shape[0]):
        total += np.float64(x[index])
        zeros += x[index] == 0
        nonfinite += not np.isfinite(x[index])
    mean = total / x.shape[0]
    m2 = 0.0
    m4 = 0.0
    for index in range(x.shape[0]):
        square = (np.float64(x[index]) - mean) ** 2
        m2 += square
        m4 += square * square
    moments[0], moments[1], moments[2], moments[3] = x.shape[0], mean, m2, m4
    moments[4], moments[5] = zeros, nonfinite


@compiled
def extremes32(patterns, top, bottom):
    """Fill top [K] with the largest signless patterns of patterns [N], descending, and bottom [K] ascending."""
    count = top.shape[0]
    top[:] = 0
    bottom[:] = 0xFFFFFFFF
    for index in range(patterns.shape[0]):
        value = np.uint32(patterns[index] & SIGNLESS32)
        if value > top[count - 1]:
            place = count - 1
            while place > 0 and top[place - 1] < value:
                top[place] = top[place - 1]
                place -= 1
            top[place] = value
        if value < bottom[count - 1]:
            place = count - 1
            while place > 0 and bottom[place - 1] > value:
                bottom[place] = bottom[place - 1]
                place -= 1
            bottom[place] = value


@compiled
def massive_of_counts(row, low, values, absolute, least):
    """Count, from the counts of a row, the elements with magnitude > absolute and ≥ least."""
    count = 0
    for column in range(1, row.shape[1]):
        value = values[low + column - 1]
        if value > absolute and value >= least:
            count += row[0, column] + row[1, column]
    return count


@compiled
def massive_of_values(x, absolute, least):
    """Count the elements of x [N] with magnitude > absolute and ≥ least."""
    count = 0
    for index in range(x.shape[0]):
        count += abs(x[index]) > absolute and abs(x[index]) >= least
    return count
