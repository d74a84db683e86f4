"""Fused reductions of two tensors, or two rows of logits, on the CPU, compiled by numba.

`pairs.py` does the same with torch's operators: on accelerators, without numba, and as the tests' oracle.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

_CHUNK = 512
"""Exponentials that are computed at a time, so that they stay in the L1 cache."""
_SIGNLESS, _MAGNITUDE, _HALF = np.uint32(0x7FFFFFFF), np.int32(0x7FFFFFFF), np.uint32(16)
_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
_MATH = {"reassoc", "contract", "nsz", "arcp"}

_IN_ORDER = {"contract"}
"""Without reordering of sums: a reordered kernel gave other bits where it was compiled than where it was loaded."""

_inner = njit(nogil=True, boundscheck=False, fastmath=_MATH)
_parallel = njit(cache=True, nogil=True, boundscheck=False, parallel=True, fastmath=_MATH)
_ordered = njit(nogil=True, boundscheck=False, fastmath=_IN_ORDER)
_parallel_ordered = njit(cache=True, nogil=True, boundscheck=False, parallel=True, fastmath=_IN_ORDER)


@_inner
def _add_powers(x, y, sums):
    signal, error, own, largest = sums
    apart = np.float32(x - y)
    bits = np.uint32(np.float32(apart).view(np.uint32) & _SIGNLESS)
    return signal + x * x, error + apart * apart, own + y * y, max(largest, bits)


# Nothing is stored inside the loops over a row, so that where its arrays lie can't change the order of the sums.
# Signless bits order as magnitudes do, with NaN above all.


@_parallel
def powers32(reference, own, found, threads):
    """Fill found [T, 4] with `ERROR_NAMES` of each row of two float32 tensors [T, C]."""
    share = (own.shape[0] + threads - 1) // threads
    for thread in prange(threads):
        for token in range(thread * share, min((thread + 1) * share, own.shape[0])):
            theirs, ours = reference[token], own[token]
            sums = np.float32(0), np.float32(0), np.float32(0), np.uint32(0)
            for channel in range(ours.shape[0]):
                sums = _add_powers(theirs[channel], ours[channel], sums)
            found[token, 0], found[token, 1], found[token, 2] = sums[:3]
            found[token, 3] = np.uint32(sums[3]).view(np.float32)


@_parallel
def powers16(reference, own, found, threads):
    """As `powers32`, of the patterns of two bfloat16 tensors, uint16 [T, C]."""
    share = (own.shape[0] + threads - 1) // threads
    for thread in prange(threads):
        for token in range(thread * share, min((thread + 1) * share, own.shape[0])):
            theirs, ours = reference[token], own[token]
            sums = np.float32(0), np.float32(0), np.float32(0), np.uint32(0)
            for channel in range(ours.shape[0]):
                x = np.uint32(np.uint32(theirs[channel]) << _HALF).view(np.float32)
                y = np.uint32(np.uint32(ours[channel]) << _HALF).view(np.float32)
                sums = _add_powers(x, y, sums)
            found[token, 0], found[token, 1], found[token, 2] = sums[:3]
            found[token, 3] = np.uint32(sums[3]).view(np.float32)


def _widen16(row, bits, floats):
    for at in range(row.shape[0]):
        bits[at] = np.int32(np.uint32(row[at]) << np.uint32(16))


def _widen32(row, bits, floats):
    for at in range(row.shape[0]):
        floats[at] = row[at]


def _widen(row, bits, floats):
    """Fill bits, which are also floats, with a row of float32, or of the patterns of bfloat16."""


@overload(_widen, inline="always")
def _widen_any(row, bits, floats):
    # numba compiles the kernels once for each dtype, with only one of the two in them.
    if row.dtype == types.uint16:
        return _widen16
    return _widen32


@_inner
def _ordered_bits(bits):
    """Return an integer that orders as the float32 of these bits does, NaN above all; of that integer, the bits."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & _MAGNITUDE))


@_inner
def _largest(bits):
    """Return the largest of a row of float32, by its bits, as `_ordered_bits` writes it."""
    top = np.int32(-(1 << 31))
    for at in range(bits.shape[0]):
        top = max(top, _ordered_bits(bits[at]))
    return top


@_inner
def _top(bits):
    """Return where the largest of a row of float32 is, by its bits, int32: they order as the values do, NaN above all.

    The first such place, where some are equal.
    """
    top = _ordered_bits(_largest(bits))
    for at in range(bits.shape[0]):
        if bits[at] == top:
            return at
    return 0


@_ordered
def _exponentials(logits, top, found, powers, exponents):
    """Fill found with e^(x − top) of float32 logits, within 1e-11 of itself; smaller results become e^−700.

    powers, exponents: two views of one scratch array, in which powers of two are made by writing their exponent bits.
    """
    for at in range(logits.shape[0]):
        # Below e^−708 float64 is subnormal, which the exponent bits alone can't make.
        x = max(np.float64(logits[at]) - top, -700.0)
        turns = np.floor(x * _LOG2E + 0.5)
        # ln 2 in two parts: the first has few enough bits that its product is exact.
        r = (x - turns * _LN2_HIGH) - turns * _LN2_LOW
        # |r| is at most ln 2 / 2, where a polynomial of degree 9 is within 1e-11.
        tail = 1 / 120 + r * (1 / 720 + r * (1 / 5040 + r * (1 / 40320 + r * (1 / 362880))))
        found[at] = 1.0 + r * (1.0 + r * (0.5 + r * (1 / 6 + r * (1 / 24 + r * tail))))
        exponents[at] = (np.int64(turns) + 1023) << 52
    for at in range(logits.shape[0]):
        found[at] *= powers[at]


@_ordered
def _sum(values, count):
    """Return the sum of the first `count` values, as eight partial sums."""
    # By hand, for the compiler may not reorder a sum here, and a single one would use no vectors.
    a = b = c = d = e = f = g = h = 0.0
    whole = count - count % 8
    for at in range(0, whole, 8):
        a += values[at]
        b += values[at + 1]
        c += values[at + 2]
        d += values[at + 3]
        e += values[at + 4]
        f += values[at + 5]
        g += values[at + 6]
        h += values[at + 7]
    for at in range(whole, count):
        a += values[at]
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@_ordered
def _nll(own, token, top, scratch, exponents):
    """Return −ln of the probability of a token."""
    mass = 0.0
    for start in range(0, own.shape[0], _CHUNK):
        part = own[start : start + _CHUNK]
        _exponentials(part, top, scratch[0], scratch[1], exponents)
        mass += _sum(scratch[0], part.shape[0])
    return top + np.log(mass) - np.float64(own[token])


@_ordered
def _common(raised, mass, rest, scratch):
    """Return Σ min(p, q) of two rows of exponentials, [2, V], and their sums."""
    common = 0.0
    for start in range(0, raised.shape[1], _CHUNK):
        p, q = raised[0, start : start + _CHUNK], raised[1, start : start + _CHUNK]
        for at in range(p.shape[0]):
            scratch[at] = min(p[at] / mass, q[at] / rest)
        common += _sum(scratch, p.shape[0])
    return common


@_ordered
def _compare(reference, own, tops, token, scratch, exponents, raised, found):
    """Fill found [4] with `SCORE_NAMES` of two rows, [5] with Σ min(p, q) too; tops [2]: their largest values.

    raised: room for the exponentials of both rows, [2, V] where they are needed again, else [2, _CHUNK].
    """
    mass = rest = weighted = 0.0
    whole = found.shape[0] > 4
    for start in range(0, own.shape[0], _CHUNK):
        x, y = reference[start : start + _CHUNK], own[start : start + _CHUNK]
        at_once = start if whole else 0
        p, q = raised[0, at_once : at_once + _CHUNK], raised[1, at_once : at_once + _CHUNK]
        _exponentials(x, tops[0], p, scratch[1], exponents)
        _exponentials(y, tops[1], q, scratch[1], exponents)
        mass += _sum(p, x.shape[0])
        rest += _sum(q, x.shape[0])
        for at in range(x.shape[0]):
            scratch[0, at] = p[at] * (np.float64(x[at]) - np.float64(y[at]))
        weighted += _sum(scratch[0], x.shape[0])
    normaliser, other = tops[0] + np.log(mass), tops[1] + np.log(rest)
    if token >= 0:
        found[0] = other - np.float64(own[token])
        found[1] = normaliser - np.float64(reference[token])
    found[2] = weighted / mass - normaliser + other
    if whole and np.isfinite(tops[0]) and np.isfinite(tops[1]):
        found[4] = _common(raised, mass, rest, scratch[0])


@_parallel_ordered
def score_rows(own, following, found, threads):
    """Fill found [T] with −ln of the probability of the token that follows, of logits [T, V]; NaN stays where it is −1.

    own: float32, or the patterns of bfloat16, uint16.
    """
    share = (own.shape[0] + threads - 1) // threads
    for thread in prange(threads):
        scratch, bits = np.empty((2, _CHUNK), dtype=np.float64), np.empty(own.shape[1], dtype=np.int32)
        logits = bits.view(np.float32)
        for row in range(thread * share, min((thread + 1) * share, own.shape[0])):
            if following[row] >= 0:
                _widen(own[row], bits, logits)
                top = np.float64(logits[_top(bits)])
                found[row] = _nll(logits, following[row], top, scratch, scratch.view(np.int64)[1])


@_parallel_ordered
def compare_rows(reference, own, following, found, threads):
    """Fill found with `SCORE_NAMES` of two logits [T, V], [T, 4], and with Σ min(p, q) where it is [T, 5].

    As those of `score_rows`; following: −1 for none. A row that has no softmax leaves the fifth number as it is.
    """
    share = (own.shape[0] + threads - 1) // threads
    for thread in prange(threads):
        scratch, bits = np.empty((2, _CHUNK), dtype=np.float64), np.empty((2, own.shape[1]), dtype=np.int32)
        raised = np.empty((2, own.shape[1] if found.shape[1] > 4 else _CHUNK), dtype=np.float64)
        x, y, tops = bits[0].view(np.float32), bits[1].view(np.float32), np.empty(2)
        for row in range(thread * share, min((thread + 1) * share, own.shape[0])):
            _widen(reference[row], bits[0], x)
            _widen(own[row], bits[1], y)
            likeliest = _top(bits[0])
            tops[0], tops[1] = x[likeliest], y[_top(bits[1])]
            _compare(x, y, tops, following[row], scratch, scratch.view(np.int64)[1], raised, found[row])
            # By value, not by index: a tie is no difference.
            found[row, 3] = 1.0 if y[likeliest] == tops[1] else 0.0


@_parallel
def lead_rows(logits, share, found, counts, threads):
    """Find the tokens of each row of logits [T, V] that may be its likeliest two, were it known more exactly.

    found [T, K] int32: those within `share` of the larger of the two, in magnitude, of the second largest; the first K.
    counts [T] int64: how many they are; 0 where the row holds NaN. logits: as `score_rows`.
    """
    width = logits.shape[1]
    parts = (width + _CHUNK - 1) // _CHUNK
    share_of_rows = (logits.shape[0] + threads - 1) // threads
    lowest = np.int32(-(1 << 31))
    for thread in prange(threads):
        bits, tops = np.empty(width, dtype=np.int32), np.empty(parts, dtype=np.int32)
        x, values = bits.view(np.float32), np.empty(2, dtype=np.int32)
        for row in range(thread * share_of_rows, min((thread + 1) * share_of_rows, logits.shape[0])):
            _widen(logits[row], bits, x)
            for part in range(parts):
                tops[part] = _largest(bits[part * _CHUNK : (part + 1) * _CHUNK])
            best = np.argmax(tops)
            values[0], values[1] = tops[best], lowest
            for part in range(parts):
                if part != best:
                    values[1] = max(values[1], tops[part])
            own = bits[best * _CHUNK : (best + 1) * _CHUNK]
            seen = False
            for at in range(own.shape[0]):
                key = _ordered_bits(own[at])
                if key == values[0] and not seen:
                    seen = True
                else:
                    values[1] = max(values[1], key)
            values[0], values[1] = _ordered_bits(values[0]), _ordered_bits(values[1])
            top, second = values.view(np.float32)
            # NaN is above all others, and no comparison with it holds.
            least = second - np.float32(share) * max(abs(top), abs(second))
            count = 0
            for part in range(parts):
                values[0] = _ordered_bits(tops[part])
                if values.view(np.float32)[0] >= least:
                    for at in range(part * _CHUNK, min((part + 1) * _CHUNK, width)):
                        if x[at] >= least:
                            if count < found.shape[1]:
                                found[row, count] = at
                            count += 1
            counts[row] = count if top == top else 0
