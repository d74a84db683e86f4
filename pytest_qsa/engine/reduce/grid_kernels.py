"""The error of rounding a tensor to a grid on the CPU, compiled by numba: torch's operators read it about ten times.

`torch_ops.py` does the same with torch's operators: on accelerators, without numba, and as the tests' oracle.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

_LEAF = 128
"""Up to how many elements numpy's pairwise sum adds without halving them (`loops_utils.h.src`: `PW_BLOCKSIZE`)."""

_compiled = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")
_parallel = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", parallel=True)


@_parallel
def powers_on_grid(x, scales, channels, floating, least_exponent, mantissa_bits, threads):
    """Return Σx² and Σ(x − x̂)² of x [T, C] float32, in float64, with the bits of numpy's sum of all elements.

    scales: [T or 1, S] float32, each of `channels` neighbouring channels. floating: the grid is that of a float with
    `mantissa_bits`, evenly spaced below 2 to the `least_exponent`; else that of the integers.
    """
    starts, lengths = _leaves(x.size)
    found = np.zeros((len(starts), 2), dtype=np.float64)
    share = (len(starts) + threads - 1) // threads
    for thread in prange(threads):
        values, errors = np.empty(_LEAF, dtype=np.float64), np.empty(_LEAF, dtype=np.float64)
        for leaf in range(thread * share, min((thread + 1) * share, len(starts))):
            at, filled = starts[leaf], 0
            while filled < lengths[leaf]:
                token, channel = divmod(at + filled, x.shape[1])
                part = channel // channels
                # to the end of the leaf, of the row, or of the channels that share the scale
                count = min(lengths[leaf] - filled, x.shape[1] - channel, (part + 1) * channels - channel)
                row = x[token, channel : channel + count]
                scale = scales[token if scales.shape[0] > 1 else 0, part]
                own, lost = values[filled : filled + count], errors[filled : filled + count]
                if floating:
                    _float_errors(row, scale, least_exponent, mantissa_bits, own, lost)
                else:
                    _integer_errors(row, scale, own, lost)
                filled += count
            found[leaf, 0], found[leaf, 1] = _sum_of_leaf(values, filled), _sum_of_leaf(errors, filled)
    return _joined(found, lengths)


@_compiled
def _integer_errors(row, scale, own, lost):
    for at in range(row.shape[0]):
        rounded = np.float32(np.rint(np.float32(row[at] / scale)) * scale)
        error = np.float64(row[at]) - np.float64(rounded)
        own[at] = np.float64(row[at]) * np.float64(row[at])
        lost[at] = error * error


@_compiled
def _float_errors(row, scale, least_exponent, mantissa_bits, own, lost):
    for at in range(row.shape[0]):
        scaled = np.float32(row[at] / scale)
        exponent = np.int32((scaled.view(np.uint32) >> np.uint32(23)) & np.uint32(255)) - np.int32(127)
        power = max(exponent, np.int32(least_exponent)) - np.int32(mantissa_bits)
        step = np.uint32((power + np.int32(127)) << np.int32(23)).view(np.float32)
        rounded = np.float32(np.float32(np.rint(np.float32(scaled / step)) * step) * scale)
        error = np.float64(row[at]) - np.float64(rounded)
        own[at] = np.float64(row[at]) * np.float64(row[at])
        lost[at] = error * error


@_compiled
def _leaves(size):
    """Return where the parts begin that numpy's pairwise sum adds at once, and how long they are: 0 for none."""
    starts, lengths = np.zeros(1, dtype=np.int64), np.full(1, size)
    while lengths.max() > _LEAF:
        begun, halves = np.zeros(2 * len(starts), dtype=np.int64), np.zeros(2 * len(starts), dtype=np.int64)
        for node in range(len(starts)):
            length = lengths[node]
            first = length // 2 - length // 2 % 8 if length > _LEAF else length
            begun[2 * node], halves[2 * node] = starts[node], first
            begun[2 * node + 1], halves[2 * node + 1] = starts[node] + first, length - first
        starts, lengths = begun, halves
    return starts, lengths


@_compiled
def _sum_of_leaf(values, count):
    if count < 8:
        total = 0.0
        for at in range(count):
            total += values[at]
        return total
    a, b, c, d, e, f, g, h = values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7]
    whole = count - count % 8
    for at in range(8, whole, 8):
        a += values[at]
        b += values[at + 1]
        c += values[at + 2]
        d += values[at + 3]
        e += values[at + 4]
        f += values[at + 5]
        g += values[at + 6]
        h += values[at + 7]
    total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for at in range(whole, count):
        total += values[at]
    return total


@_compiled
def _joined(found, lengths):
    """Add the sums of the leaves [leaves, 2] as they were halved."""
    while len(found) > 1:
        pairs = len(found) // 2
        sums, wide = np.zeros((pairs, 2), dtype=np.float64), np.zeros(pairs, dtype=np.int64)
        for node in range(pairs):
            wide[node] = lengths[2 * node] + lengths[2 * node + 1]
            for column in range(2):
                sums[node, column] = found[2 * node, column]
                if lengths[2 * node + 1]:
                    sums[node, column] += found[2 * node + 1, column]
        found, lengths = sums, wide
    return found[0]
