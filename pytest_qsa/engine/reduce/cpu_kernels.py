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

from .storage import FULL, HALF, HELD, LEAST, TOP

SIGNLESS16, SIGNLESS32 = np.uint16(0x7FFF), np.uint32(0x7FFFFFFF)
STEP = 64

_compiled = njit(cache=True, nogil=True, boundscheck=False)
_parallel = njit(cache=True, nogil=True, boundscheck=False, parallel=True)


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


@_parallel
def tokens_of(patterns, threads, record, peaks):
    """Fill the record of patterns [T, C] (storage.py), of whose largest tokens `peaks` keep their channel.

    Returns the largest signless pattern. Each thread takes a share of the tokens.
    """
    kind = patterns.dtype.type
    signless = kind((1 << (8 * patterns.itemsize - 1)) - 1)
    share = (patterns.shape[0] + threads - 1) // threads
    for thread in prange(threads):
        for token in range(thread * share, min((thread + 1) * share, patterns.shape[0])):
            row = patterns[token]
            largest = kind(0)
            for channel in range(row.shape[0]):
                largest = max(largest, kind(row[channel] & signless))
            record[token] = largest
    return _summarise(patterns, signless, record, peaks)


@_parallel
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


@_parallel
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


@_compiled
def _summarise(patterns, signless, record, peaks):
    """Write the peaks of patterns [T, C] into a record that has the maxima; return the largest of these."""
    count = patterns.shape[0]
    maxima = record[:count]
    top = maxima[0]
    for token in range(1, count):
        top = max(top, maxima[token])
    if peaks:
        numbers = record[count + count % 2 :].view(np.int32)
        positions, channels = numbers[:peaks], numbers[peaks : 2 * peaks]
        _order_peaks(maxima, positions)
        for peak in range(peaks):
            channels[peak] = _first_of(patterns[positions[peak]], signless, maxima[positions[peak]])
    return np.int64(top)


@_compiled
def _first_of(row, signless, magnitude):
    """Return the index of a signless pattern's first occurrence in a row [C]; `STEP` elements are compared at once."""
    begin = 0
    while begin < row.shape[0]:
        found = False
        for channel in range(begin, min(begin + STEP, row.shape[0])):
            found |= row[channel] & signless == magnitude
        if found:
            break
        begin += STEP
    for channel in range(begin, row.shape[0]):
        if row[channel] & signless == magnitude:
            return channel
    return 0


@_compiled
def _order_peaks(maxima, positions):
    count = positions.shape[0]
    filled = 0
    for token in range(maxima.shape[0]):
        # Of equal maxima the first token comes first, as in torch's stable sort.
        if filled == count and maxima[token] <= maxima[positions[count - 1]]:
            continue
        if filled < count:
            filled += 1
        place = filled - 1
        while place > 0 and maxima[positions[place - 1]] < maxima[token]:
            positions[place] = positions[place - 1]
            place -= 1
        positions[place] = token


# Two kernels, for constants of a known type make this loop one of vectors: for any type it takes 1.7 times as long.


@_compiled
def _count16(patterns, begin, end, known, bins, record):
    """Count the tokens from `begin` to `end` of patterns [T, C] into bins, and write their maxima into the record.

    Returns the least signless pattern above zero, less one; 65,535 for none.
    """
    least = np.uint16(0xFFFF)
    for token in range(begin, end):
        line = patterns[token]
        largest = np.uint16(0)
        for channel in range(line.shape[0]):
            magnitude = np.uint16(line[channel] & SIGNLESS16)
            largest = max(largest, magnitude)
            # Less one, so that zero wraps around to the largest pattern and is never the least.
            least = min(least, np.uint16(magnitude - np.uint16(1)))
        # A loop of its own: writes to bins keep the compiler from vector instructions, which the maxima get.
        for channel in range(line.shape[0]):
            bins[line[channel] & known] += np.uint32(1)
        record[token] = largest
    return least


@_parallel
def survey_each16(patterns, ends, peaks, scratch, rows, values, records, starts, moments):
    """Fill the record of each of several populations, which end at `ends` [S] in patterns [N, C]; and its moments.

    The record of population s, with peaks[s] peaks, begins at starts[s] of the flat records; moments [S, 7], or [0, 7]
    for none. Each thread takes whole populations, and has bins, scratch [threads, 65,536], and a row of counts, rows
    [threads, 2, 32,769], of its own.
    """
    threads = scratch.shape[0]
    nowhere = np.zeros((1, 0), dtype=np.uint32)
    for thread in prange(threads):
        for index in range(thread, ends.shape[0], threads):
            lines = patterns[ends[index - 1] if index else 0 : ends[index]]
            record = records[starts[index] : starts[index + 1]]
            if not moments.shape[0]:
                _maxima16(lines, record)
                _summarise(lines, SIGNLESS16, record, peaks[index])
                continue
            least = _count16(lines, 0, lines.shape[0], np.uint16(0xFFFF), scratch[thread], record)
            top = _summarise(lines, SIGNLESS16, record, peaks[index])
            low = max(1, min(np.int64(least) + 1, top))
            settle(scratch[thread : thread + 1], low, top, 2, nowhere, 1, rows[thread])
            moments_of_counts(rows[thread, :, : max(1, top - low + 2)], low, values, moments[index])


@_compiled
def _maxima16(patterns, record):
    for token in range(patterns.shape[0]):
        line = patterns[token]
        largest = np.uint16(0)
        for channel in range(line.shape[0]):
            largest = max(largest, np.uint16(line[channel] & SIGNLESS16))
        record[token] = largest


@_parallel
def survey16(patterns, record, peaks, smallest, scratch, signs, sums, base, marks, row):
    """Fill the record of patterns [T, C] as `tokens_of`; count them, with their sign or without it (`signs` 2 or 1).

    The counts are flushed into the sums, and noted in the marks, where the sums have room for them. Returns the largest
    signless pattern, the least above zero (65,536 for none), and what `settle` returns. Each thread takes a share of
    the tokens and has bins, scratch [threads, 65,536], and a least pattern of its own.
    """
    threads = scratch.shape[0]
    share = (patterns.shape[0] + threads - 1) // threads
    known = np.uint16(0xFFFF) if signs == 2 else SIGNLESS16
    for thread in prange(threads):
        end = min((thread + 1) * share, patterns.shape[0])
        smallest[thread] = _count16(patterns, thread * share, end, known, scratch[thread], record)
    top = _summarise(patterns, SIGNLESS16, record, peaks)
    least = _least(smallest)
    zeros = -1
    # The sums have 32 bits: where they could overflow, the caller carries them over first.
    if marks[HELD] + patterns.size < FULL:
        zeros = settle(scratch, max(1, min(least, top)), top, signs, sums, base, row)
    if zeros >= 0:
        _mark(marks, patterns.size, top, 0 if zeros else least)
    return top, least, zeros


@_parallel
def survey32(patterns, record, peaks, smallest, scratch, signs, sums, base, marks, row):
    """As `survey16`, for float32, whose bins are its upper halves."""
    threads = scratch.shape[0]
    share = (patterns.shape[0] + threads - 1) // threads
    known = np.uint32(0xFFFFFFFF) if signs == 2 else SIGNLESS32
    for thread in prange(threads):
        bins = scratch[thread]
        least = np.uint32(0xFFFFFFFF)
        for token in range(thread * share, min((thread + 1) * share, patterns.shape[0])):
            line = patterns[token]
            largest = np.uint32(0)
            for channel in range(line.shape[0]):
                magnitude = np.uint32(line[channel] & SIGNLESS32)
                largest = max(largest, magnitude)
                least = min(least, np.uint32(magnitude - np.uint32(1)))
            for channel in range(line.shape[0]):
                bins[(line[channel] & known) >> np.uint32(16)] += np.uint32(1)
            record[token] = largest
        smallest[thread] = least
    top = _summarise(patterns, SIGNLESS32, record, peaks)
    least = _least(smallest)
    zeros = -1
    if marks[HELD] + patterns.size < FULL:
        zeros = settle(scratch, max(1, min(least, top) >> 16), top >> 16, signs, sums, base, row)
    if zeros >= 0:
        _mark(marks, patterns.size, top, 0 if zeros else least)
    return top, least, zeros


@_compiled
def _mark(marks, count, top, least):
    """Note that the sums hold `count` more elements, and the largest and the least pattern among them."""
    marks[HELD] += count
    marks[TOP] = max(marks[TOP], top)
    marks[LEAST] = min(marks[LEAST], least)


@_compiled
def _least(smallest):
    """Return the least of the threads' patterns, which are stored less one, so that 0 is none."""
    least = smallest[0]
    for thread in range(1, smallest.shape[0]):
        least = min(least, smallest[thread])
    return np.int64(least) + 1


@_compiled
def settle(scratch, low, high, signs, sums, base, row):
    """Flush the counts of a row from scratch, which is then zero again; return how many zeros there were.

    row [2, ≥ high − low + 2] uint32, or [2, 0]: the counts of +x and −x, or of |x| and 0 where there is one sign;
    column 0 is zero itself, column 1 the pattern `low`. sums [2, W], of +x and −x, or [1, W] of |x|, are added to;
    their column 1 is the pattern `base`. An empty row or sums is skipped. Returns −1, and changes nothing, where the
    sums don't reach from `low` to `high`.
    """
    high = max(high, low - 1)
    zeros = 0
    place = low - base + 1
    if sums.shape[1] and high >= low and (place < 1 or high - base + 2 > sums.shape[1]):
        return -1
    for sign in range(signs):
        zero, first = sign * HALF, sign * HALF + low
        bins = scratch[0, first : first + high - low + 1]
        for thread in range(1, scratch.shape[0]):
            _add_and_clear(bins, scratch[thread, first : first + high - low + 1])
            scratch[0, zero] += scratch[thread, zero]
            scratch[thread, zero] = 0
        if row.shape[1]:
            row[sign, 0] = scratch[0, zero]
            row[sign, 1 : high - low + 2] = bins
        if sums.shape[1]:
            line = sums[sign % sums.shape[0]]
            line[0] += scratch[0, zero]
            _add_and_clear(line[place : place + bins.shape[0]], bins)
        else:
            bins[:] = 0
        zeros += scratch[0, zero]
        scratch[0, zero] = 0
    if row.shape[1] and signs == 1:
        # The row is scratch: an earlier one with signs may have filled its second line.
        row[1, : high - low + 2] = 0
    return zeros


# A plain loop over slices of equal length: such loops the compiler turns into vector instructions.


@_compiled
def _add_and_clear(sums, counts):
    for index in range(counts.shape[0]):
        sums[index] += counts[index]
        counts[index] = 0


@_compiled
def order_of(row, low, values, ranks, ascending, order):
    """Fill order [R] with the magnitudes at ranks [R] from a row's counts. ascending [R]: the order of the ranks."""
    seen = 0
    rank = 0
    for column in range(row.shape[1]):
        seen += row[0, column] + row[1, column]
        while rank < ranks.shape[0] and seen > ranks[ascending[rank]]:
            order[ascending[rank]] = values[0 if column == 0 else low + column - 1]
            rank += 1


@_compiled
def signed_ends(row, low, values):
    """Return the smallest and the largest x from the counts of a row; NaN if there is one."""
    last = row.shape[1] - 1
    if last and np.isnan(values[low + last - 1]):
        return np.nan, np.nan
    return -_largest(row[1], row[0], low, values), _largest(row[0], row[1], low, values)


@_compiled
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


@_compiled
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


@_compiled
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


@_compiled
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


@_compiled
def massive_of_counts(row, low, values, absolute, least):
    """Count, from the counts of a row, the elements with magnitude > absolute and ≥ least."""
    count = 0
    for column in range(1, row.shape[1]):
        value = values[low + column - 1]
        if value > absolute and value >= least:
            count += row[0, column] + row[1, column]
    return count


@_compiled
def massive_of_values(x, absolute, least):
    """Count the elements of x [N] with magnitude > absolute and ≥ least."""
    count = 0
    for index in range(x.shape[0]):
        count += abs(x[index]) > absolute and abs(x[index]) >= least
    return count
