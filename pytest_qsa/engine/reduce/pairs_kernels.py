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
_KNOWN = 300.0
"""Rows of bfloat16 whose largest value is no larger in magnitude are raised without it: no sum leaves float64."""
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


@_inner
def _top(row):
    """Return where the largest of a row is, NaN above all: the first such place, where some are equal."""
    best, where = -(1 << 40), 0
    for start in range(0, row.shape[0], _CHUNK):
        largest = _largest_key(row[start : start + _CHUNK])
        if largest > best:
            best, where = largest, start
    for at in range(where, min(where + _CHUNK, row.shape[0])):
        if _largest_key(row[at : at + 1]) == best:
            return at
    return 0


def _largest_key16(row):
    top = np.int16(-(1 << 15))
    for at in range(row.shape[0]):
        bits = np.int16(row[at])
        top = max(top, np.int16(bits ^ np.int16(np.int16(bits >> np.int16(15)) & np.int16(0x7FFF))))
    return np.int64(top)


def _largest_key32(row):
    return np.int64(_largest(row.view(np.int32)))


def _largest_key(row):
    """Return an integer that orders as the largest of a row, float32 or patterns of bfloat16, does; NaN above all."""


@overload(_largest_key)
def _largest_key_any(row):
    if row.dtype == types.uint16:
        return _largest_key16
    return _largest_key32


def _value16(row, at):
    return np.float64(np.uint32(np.uint32(row[at]) << _HALF).view(np.float32))


def _value32(row, at):
    return np.float64(row[at])


def _value(row, at):
    """Return one value of a row of float32, or of the patterns of bfloat16."""


@overload(_value)
def _value_any(row, at):
    if row.dtype == types.uint16:
        return _value16
    return _value32


@_inner
def _base(row, at):
    """Return what the values of a row are raised without, whose largest is at a place: as `_raise` takes it."""
    value = _value(row, at)
    return 0.0 if row.itemsize == 2 and abs(value) <= _KNOWN else value


def _raise16(row, logits, base, raised, found, powers, exponents):
    if base == 0.0:
        for at in range(row.shape[0]):
            found[at] = raised[row[at]]
    else:
        _exponentials(logits, base, found, powers, exponents)


def _raise32(row, logits, base, raised, found, powers, exponents):
    _exponentials(logits, base, found, powers, exponents)


def _raise(row, logits, base, raised, found, powers, exponents):
    """Fill found with e^(x − base) of a part of a row, float32 or the patterns of bfloat16; logits: as float32.

    raised [65536]: e^x of each bfloat16.
    """


@overload(_raise)
def _raise_any(row, logits, base, raised, found, powers, exponents):
    if row.dtype == types.uint16:
        return _raise16
    return _raise32


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
def _nll(own, token, raised, bits, scratch):
    """Return −ln of the probability of a token of a row. bits, scratch: as `_scratch` makes them."""
    logits, powers, base, mass = bits.view(np.float32), scratch[1], _base(own, _top(own)), 0.0
    for start in range(0, own.shape[0], _CHUNK):
        part = own[start : start + _CHUNK]
        x = logits[0, : part.shape[0]]
        _widen(part, bits[0], x)
        _raise(part, x, base, raised, scratch[0], powers, powers.view(np.int64))
        mass += _sum(scratch[0], part.shape[0])
    return base + np.log(mass) - _value(own, token)


@_ordered
def _common(raised, mass, rest, scratch):
    """Return Σ min(p, q) of two rows of exponentials, [2, V], and their sums."""
    common, one, other = 0.0, 1.0 / mass, 1.0 / rest
    for start in range(0, raised.shape[1], _CHUNK):
        p, q = raised[0, start : start + _CHUNK], raised[1, start : start + _CHUNK]
        for at in range(p.shape[0]):
            scratch[at] = min(p[at] * one, q[at] * other)
        common += _sum(scratch, p.shape[0])
    return common


@_ordered
def _compare(reference, own, token, raised, bits, scratch, whole, found):
    """Fill found [4] with `SCORE_NAMES` of two rows, [5] with Σ min(p, q) too. bits, scratch: as `_scratch` makes them.

    whole: room for the exponentials of both rows, [2, V] where they are needed again, else [2, _CHUNK].
    """
    logits, powers = bits.view(np.float32), scratch[1]
    exponents = powers.view(np.int64)
    likeliest, decided = _top(reference), _top(own)
    theirs, ours = _base(reference, likeliest), _base(own, decided)
    mass = rest = weighted = 0.0
    again = found.shape[0] > 4
    for start in range(0, own.shape[0], _CHUNK):
        one, other = reference[start : start + _CHUNK], own[start : start + _CHUNK]
        x, y = logits[0, : one.shape[0]], logits[1, : one.shape[0]]
        _widen(one, bits[0], x)
        _widen(other, bits[1], y)
        at_once = start if again else 0
        p, q = whole[0, at_once : at_once + _CHUNK], whole[1, at_once : at_once + _CHUNK]
        _raise(one, x, theirs, raised, p, powers, exponents)
        _raise(other, y, ours, raised, q, powers, exponents)
        mass += _sum(p, x.shape[0])
        rest += _sum(q, x.shape[0])
        products = scratch[0]
        for at in range(x.shape[0]):
            products[at] = p[at] * (np.float64(x[at]) - np.float64(y[at]))
        weighted += _sum(products, x.shape[0])
    normaliser, rest_normaliser = theirs + np.log(mass), ours + np.log(rest)
    if token >= 0:
        found[0] = rest_normaliser - _value(own, token)
        found[1] = normaliser - _value(reference, token)
    found[2] = weighted / mass - normaliser + rest_normaliser
    # By value, not by index: a tie is no difference.
    found[3] = 1.0 if _value(own, likeliest) == _value(own, decided) else 0.0
    if again and np.isfinite(theirs) and np.isfinite(ours):
        found[4] = _common(whole, mass, rest, scratch[0])


@_inner
def _scratch():
    """Return room for a part of two rows as float32, by its bits, [2, _CHUNK], and for two parts' exponentials."""
    return np.empty((2, _CHUNK), dtype=np.int32), np.empty((2, _CHUNK), dtype=np.float64)


@_parallel_ordered
def score_rows(own, following, found, raised, threads):
    """Fill found [T] with −ln of the probability of the token that follows, of logits [T, V]; NaN stays where it is −1.

    own: float32, or the patterns of bfloat16, uint16; raised [65536]: e^x of each bfloat16.
    """
    share = (own.shape[0] + threads - 1) // threads
    for thread in prange(threads):
        bits, scratch = _scratch()
        for row in range(thread * share, min((thread + 1) * share, own.shape[0])):
            if following[row] >= 0:
                found[row] = _nll(own[row], following[row], raised, bits, scratch)


@_parallel_ordered
def compare_rows(reference, own, following, found, raised, threads):
    """Fill found with `SCORE_NAMES` of two logits [T, V], [T, 4], and with Σ min(p, q) where it is [T, 5].

    As those of `score_rows`; following: −1 for none. A row that has no softmax leaves the fifth number as it is.
    """
    share = (own.shape[0] + threads - 1) // threads
    for thread in prange(threads):
        bits, scratch = _scratch()
        whole = np.empty((2, own.shape[1] if found.shape[1] > 4 else _CHUNK), dtype=np.float64)
        for row in range(thread * share, min((thread + 1) * share, own.shape[0])):
            _compare(reference[row], own[row], following[row], raised, bits, scratch, whole, found[row])


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
