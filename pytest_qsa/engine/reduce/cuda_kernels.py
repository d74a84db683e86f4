"""The fused reduction for CUDA, compiled by Triton: maxima of tokens and channels, and counts, in one read.

As in cpu_kernels.py all work is on bit patterns of 16-bit floats; torch_ops.py does the same with torch's operators.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def survey(
    patterns,
    token_max,
    token_at,
    channel_max,
    counts,
    size,
    columns,
    half: tl.constexpr,
    with_tokens: tl.constexpr,
    with_channels: tl.constexpr,
    bins: tl.constexpr,
    copies: tl.constexpr,
    rows_each: tl.constexpr,
    block: tl.constexpr,
):
    """Read patterns [T, columns] int16, `size` in all; each program takes rows_each of them.

    token_max [T] float32 and token_at [T] int32: the largest magnitude of a row, and its column. channel_max [columns]
    int32: signless patterns. counts [copies, bins] int32: how often each pattern occurs, the sign apart where bins has
    room for it; copies, so that fewer programs wait for one another at one address. half: float16, else bfloat16.
    """
    rows = tl.program_id(0) * rows_each + tl.arange(0, rows_each)
    # Below every magnitude, so that a row of zeros has a column too.
    best = tl.full([rows_each], -1, tl.int32)
    at = tl.zeros([rows_each], tl.int32)
    own = counts + (tl.program_id(0) % copies) * bins
    for start in range(0, columns, block):
        places = start + tl.arange(0, block)
        # 64 bits: an offset in a large tensor doesn't fit into 32.
        index = rows[:, None].to(tl.int64) * columns + places[None, :]
        there = (places[None, :] < columns) & (index < size)
        values = tl.load(patterns + index, mask=there, other=0).to(tl.int32)
        magnitudes = tl.where(there, values & 0x7FFF, -1)
        if with_tokens:
            here, column = tl.max(magnitudes, axis=1, return_indices=True)
            at = tl.where(here > best, start + column, at)
            best = tl.maximum(here, best)
        if with_channels:
            tl.atomic_max(channel_max + places, tl.max(magnitudes, axis=0), mask=places < columns, sem="relaxed")
        if bins:
            tl.atomic_add(own + (values & (bins - 1)), 1, mask=there, sem="relaxed")
    if with_tokens:
        inside = rows.to(tl.int64) * columns < size
        if half:
            maxima = best.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            maxima = (best << 16).to(tl.float32, bitcast=True)
        tl.store(token_max + rows, maxima, mask=inside)
        tl.store(token_at + rows, at, mask=inside)


@triton.jit
def powers(reference, own, found, columns, block: tl.constexpr):
    """Fill found [rows, 4] float32 with Σx², Σ(x − y)², Σy², max |x − y| of each row of two arrays [rows, columns].

    Sums of a block are in float32, sums of blocks in float64.
    """
    row = tl.program_id(0).to(tl.int64)
    signal = tl.zeros([1], tl.float64)
    error = tl.zeros([1], tl.float64)
    power = tl.zeros([1], tl.float64)
    largest = tl.zeros([1], tl.float32)
    for start in range(0, columns, block):
        places = start + tl.arange(0, block)
        x = tl.load(reference + row * columns + places, mask=places < columns, other=0).to(tl.float32)
        y = tl.load(own + row * columns + places, mask=places < columns, other=0).to(tl.float32)
        difference = x - y
        signal += tl.sum(x * x, axis=0).to(tl.float64)
        error += tl.sum(difference * difference, axis=0).to(tl.float64)
        power += tl.sum(y * y, axis=0).to(tl.float64)
        # A maximum may drop NaN: it counts as ∞ here, and becomes NaN again when the row is stored.
        here = tl.where(difference == difference, tl.abs(difference), float("inf"))
        largest = tl.maximum(largest, tl.max(here, axis=0))
    one = tl.arange(0, 1)
    tl.store(found + row * 4 + one, signal.to(tl.float32))
    tl.store(found + row * 4 + 1 + one, error.to(tl.float32))
    tl.store(found + row * 4 + 2 + one, power.to(tl.float32))
    tl.store(found + row * 4 + 3 + one, tl.where(error == error, largest, float("nan")))


@triton.jit
def compare(reference, own, following, found, columns, compared: tl.constexpr, block: tl.constexpr):
    """Fill found [rows, 4] float64 with `SCORE_NAMES` of each row of two arrays of logits [rows, columns].

    following [rows] int64: the token that came next, −1 for none, which leaves its numbers as they are. Without
    `compared` there is the model's own alone.
    """
    row = tl.program_id(0).to(tl.int64)
    top, other_top, at = float("-inf"), float("-inf"), 0
    for start in range(0, columns, block):
        places = start + tl.arange(0, block)
        y = tl.load(own + row * columns + places, mask=places < columns, other=float("-inf")).to(tl.float32)
        other_top = tl.maximum(other_top, tl.max(y, axis=0))
        if compared:
            x = tl.load(reference + row * columns + places, mask=places < columns, other=float("-inf")).to(tl.float32)
            here, index = tl.max(x, axis=0, return_indices=True)
            at = tl.where(here > top, start + index, at)
            top = tl.maximum(top, here)
    rest = tl.zeros([block], tl.float64)
    mass = tl.zeros([block], tl.float64)
    weighted = tl.zeros([block], tl.float64)
    for start in range(0, columns, block):
        places = start + tl.arange(0, block)
        there = places < columns
        y = tl.load(own + row * columns + places, mask=there, other=float("-inf")).to(tl.float64)
        rest += tl.exp(y - other_top)
        if compared:
            x = tl.load(reference + row * columns + places, mask=there, other=float("-inf")).to(tl.float64)
            exponential = tl.exp(x - top)
            mass += exponential
            weighted += tl.where(there, exponential * (x - y), 0.0)
    one = tl.arange(0, 1)
    token = tl.load(following + row)
    other_norm = other_top + tl.log(tl.sum(rest, axis=0))
    if token >= 0:
        tl.store(found + row * 4 + one, other_norm - tl.load(own + row * columns + token + one).to(tl.float64))
    if compared:
        total = tl.sum(mass, axis=0)
        norm = top + tl.log(total)
        if token >= 0:
            tl.store(found + row * 4 + 1 + one, norm - tl.load(reference + row * columns + token + one).to(tl.float64))
        tl.store(found + row * 4 + 2 + one, tl.sum(weighted, axis=0) / total - norm + other_norm + one * 0.0)
        # By value, not by index: a tie is no difference.
        same = tl.load(own + row * columns + at + one).to(tl.float32) == other_top
        tl.store(found + row * 4 + 3 + one, same.to(tl.float64))
