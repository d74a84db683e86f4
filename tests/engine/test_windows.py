"""Counts that are kept only where they occur, against a dictionary of all that was added."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings, strategies as st

from pytest_qsa.engine.reduce.observer import StreamObserver
from pytest_qsa.engine.reduce.storage import HALF, Window
from support.captures import statistics


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(1, HALF - 1), st.integers(0, 600)), max_size=6))
def test_a_window_that_grows_forgets_nothing(runs):
    window, want = Window(True, True, "bfloat16"), Counter()
    for low, length in runs:
        high = min(low + length, HALF - 1)
        window.expect(3)
        window.cover(low, high)
        for bin in (0, low, high):
            window.sums[1, 0 if bin == 0 else bin - window.base + 1] += 1
            want[bin] += 1
    found = window.arrays()
    for bins, counts, offset in (("bins", "counts", 0), ("signed_bins", "signed_counts", HALF)):
        assert found[bins].tolist() == [bin + offset for bin in sorted(want)]
        assert found[counts].tolist() == [want[bin] for bin in sorted(want)]


def test_a_bin_counts_further_than_32_bits_go():
    window = Window(True, True, "bfloat16")
    half = 1 << 31
    for bin in (5, 5, 300, 5):
        window.expect(half)
        window.cover(bin, bin)
        window.sums[0, bin - window.base + 1] += half
    found = window.arrays()
    assert dict(zip(found["bins"].tolist(), found["counts"].tolist(), strict=True)) == {5: 3 * half, 300: half}
    assert found["signed_counts"].tolist() == [3 * half, half]


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.lists(st.integers(-100, 120), min_size=1, max_size=5),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(0, 99),
)
def test_rows_of_very_different_scales_are_all_counted(octaves, dtype, seed):
    observer = StreamObserver(statistics("counts", "signed_counts"))
    rows = [torch.randn(40, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(octaves))]
    rows = [(row.double() * 2.0**octave).to(dtype) for row, octave in zip(rows, octaves, strict=True)]
    for index, row in enumerate(rows):
        observer.add(row[None], [None], [index], 0, token_axis=False)
    numbers = observer.numbers(statistics("counts", "signed_counts"))
    x = torch.cat(rows)
    patterns = x.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).numpy()
    halves = patterns.view(np.uint16) if dtype == torch.bfloat16 else (patterns.view(np.uint32) >> 16).astype(np.uint16)
    bins, counts = np.unique(halves, return_counts=True)
    np.testing.assert_array_equal(numbers.signed_bins, bins)
    np.testing.assert_array_equal(numbers.signed_counts, counts)
    bins, counts = np.unique(halves & 0x7FFF, return_counts=True)
    np.testing.assert_array_equal(numbers.bins, bins)
    np.testing.assert_array_equal(numbers.counts, counts)
    magnitudes = x.double().abs().numpy()
    assert numbers.extremes.tolist() == [magnitudes.max(), magnitudes.min(), x.double().min(), x.double().max()]


def test_counts_of_rows_that_32_bits_do_not_hold_are_whole():
    observer, x = StreamObserver(statistics("counts")), torch.ones(1, 6, dtype=torch.bfloat16)
    observer.add(x, [None], [0], 0, token_axis=False)
    window = observer.kept.pooled["window"]
    missing = (1 << 32) - 8 - 6  # as if so many ones more had come before
    window.sums[window.sums > 0] += np.uint32(missing)
    window.expect(missing)
    observer.add(x, [None], [1], 0, token_axis=False)
    observer.add(x, [None], [2], 0, token_axis=False)
    assert observer.numbers(statistics("counts")).counts.tolist() == [missing + 18]
