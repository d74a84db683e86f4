"""One row of a site on the CPU: maxima of its tokens, peaks, and counts of its patterns (see cpu_kernels.py)."""

from __future__ import annotations

import numpy as np
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from .cpu_kernels import SIGNLESS16, SIGNLESS32, compiled, moments_of_counts, parallel
from .storage import FULL, HALF, HELD, LEAST, TOP

STEP = 64


@compiled
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


@compiled
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


@compiled
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


# What follows takes addresses. To make arrays of a tensor and to hand ten of them over costs Python as much time as the
# kernel takes for a small tensor, while the forward's other threads wait.

FIELDS = 16
(
    TOKENS, CHANNELS, RECORD, PEAKS, COUNTED, SIGNS,
    THREADS, SMALLEST, SCRATCH, SUMS, LINES, WIDTH, BASE, MARKS, ROW, COLUMNS,
) = range(FIELDS)  # fmt: skip
"""The indices of a description, int64: what the calls of a site have in common. Numbers, and addresses of arrays.

The shape of the patterns [T, C], the length of their record and how many peaks it has; whether they are counted, and
with their sign (2) or without (1). smallest [threads], scratch [threads, 65,536]: each thread's own. sums [LINES,
WIDTH], whose column 1 is the pattern `base`, with its marks; row [2, COLUMNS]: see `settle`.
"""
DESCRIPTION = FIELDS * 8
"""The bytes of a description."""


@intrinsic
def _pointer(_typing, _address):
    """Return an address as the pointer that `carray` takes."""
    return types.voidptr(types.int64), _as_pointer


def _as_pointer(_context, builder, _signature, arguments):
    return builder.inttoptr(arguments[0], cgutils.voidptr_t)


@compiled
def describe(description, sizes, smallest, scratch, sums, base, marks, row):
    """Write a description to an address. `sizes`: the fields from TOKENS to SIGNS."""
    call = carray(_pointer(description), (FIELDS,), np.int64)
    for field in range(THREADS):
        call[field] = sizes[field]
    call[THREADS], call[SMALLEST], call[SCRATCH] = scratch.shape[0], smallest.ctypes.data, scratch.ctypes.data
    call[SUMS], call[LINES], call[WIDTH] = sums.ctypes.data, sums.shape[0], sums.shape[1]
    call[BASE], call[MARKS] = base, marks.ctypes.data
    call[ROW], call[COLUMNS] = row.ctypes.data, row.shape[1]


@compiled
def _described(address, record, description, kind):
    """Return a description, and patterns, record, smallest, scratch, sums, marks and row at the addresses it has."""
    call = carray(_pointer(description), (FIELDS,), np.int64)
    return (
        call,
        carray(_pointer(address), (call[TOKENS], call[CHANNELS]), kind),
        carray(_pointer(record), (call[RECORD],), kind),
        carray(_pointer(call[SMALLEST]), (call[THREADS],), kind),
        carray(_pointer(call[SCRATCH]), (call[THREADS], 1 << 16), np.uint32),
        carray(_pointer(call[SUMS]), (call[LINES], call[WIDTH]), np.uint32),
        carray(_pointer(call[MARKS]), (3,), np.int64),
        carray(_pointer(call[ROW]), (2, call[COLUMNS]), np.uint32),
    )


# Two kernels, for constants of a known type make this loop one of vectors: for any type it takes 1.7 times as long.


@compiled
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


@parallel
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


@compiled
def _maxima16(patterns, record):
    for token in range(patterns.shape[0]):
        line = patterns[token]
        largest = np.uint16(0)
        for channel in range(line.shape[0]):
            largest = max(largest, np.uint16(line[channel] & SIGNLESS16))
        record[token] = largest


@parallel
def survey16(address, record, description):
    """Fill the record (storage.py) of 16-bit patterns [T, C] at an address, and count them if they are to be counted.

    The counts are flushed into the sums, and noted in the marks, where the sums have room for them. Returns the largest
    signless pattern, the least above zero (65,536 for none), and what `settle` returns; the last two only of patterns
    that are counted. Each thread takes a share of the tokens and has bins and a least pattern of its own.
    """
    call, patterns, kept, smallest, scratch, sums, marks, row = _described(address, record, description, np.uint16)
    threads, counted = scratch.shape[0], call[COUNTED]
    share = (patterns.shape[0] + threads - 1) // threads
    known = np.uint16(0xFFFF) if call[SIGNS] == 2 else SIGNLESS16
    for thread in prange(threads):
        begin, end = thread * share, min((thread + 1) * share, patterns.shape[0])
        if counted:
            smallest[thread] = _count16(patterns, begin, end, known, scratch[thread], kept)
        else:
            _maxima16(patterns[begin:end], kept[begin:end])
    top = _summarise(patterns, SIGNLESS16, kept, call[PEAKS])
    least = _least(smallest)
    return top, least, _flush(call, patterns.size, top, least, 0, scratch, sums, marks, row)


@parallel
def survey32(address, record, description):
    """As `survey16`, for float32, whose bins are its upper halves."""
    call, patterns, kept, smallest, scratch, sums, marks, row = _described(address, record, description, np.uint32)
    threads, counted = scratch.shape[0], call[COUNTED]
    share = (patterns.shape[0] + threads - 1) // threads
    known = np.uint32(0xFFFFFFFF) if call[SIGNS] == 2 else SIGNLESS32
    for thread in prange(threads):
        bins = scratch[thread]
        least = np.uint32(0xFFFFFFFF)
        for token in range(thread * share, min((thread + 1) * share, patterns.shape[0])):
            line = patterns[token]
            largest = np.uint32(0)
            if not counted:
                for channel in range(line.shape[0]):
                    largest = max(largest, np.uint32(line[channel] & SIGNLESS32))
            else:
                for channel in range(line.shape[0]):
                    magnitude = np.uint32(line[channel] & SIGNLESS32)
                    largest = max(largest, magnitude)
                    least = min(least, np.uint32(magnitude - np.uint32(1)))
                for channel in range(line.shape[0]):
                    bins[(line[channel] & known) >> np.uint32(16)] += np.uint32(1)
            kept[token] = largest
        smallest[thread] = least
    top = _summarise(patterns, SIGNLESS32, kept, call[PEAKS])
    least = _least(smallest)
    return top, least, _flush(call, patterns.size, top, least, 16, scratch, sums, marks, row)


@compiled
def _flush(call, count, top, least, shift, scratch, sums, marks, row):
    """Flush the counts of `count` patterns into the sums and note them in the marks; return what `settle` returns.

    `shift`: the bits of a pattern that its bin leaves out.
    """
    # The sums have 32 bits: where they could overflow, the caller carries them over first.
    if not call[COUNTED] or marks[HELD] + count >= FULL:
        return -1
    low, high = max(1, min(least, top) >> shift), top >> shift
    zeros = settle(scratch, low, high, call[SIGNS], sums, call[BASE], row)
    if zeros >= 0:
        marks[HELD] += count
        marks[TOP] = max(marks[TOP], top)
        marks[LEAST] = min(marks[LEAST], 0 if zeros else least)
    return zeros


@compiled
def _least(smallest):
    """Return the least of the threads' patterns, which are stored less one, so that 0 is none."""
    least = smallest[0]
    for thread in range(1, smallest.shape[0]):
        least = min(least, smallest[thread])
    return np.int64(least) + 1


@compiled
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


@compiled
def _add_and_clear(sums, counts):
    for index in range(counts.shape[0]):
        sums[index] += counts[index]
        counts[index] = 0
