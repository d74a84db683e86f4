"""Counts of 16-bit patterns: a distribution that is exact for 16-bit floats, and merges by adding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst

from pytest_qsa import capture
from pytest_qsa.captures import ALL_STATISTICS
from pytest_qsa.captures.distributions import bin_values, counted_quantile, sorted_counts
from pytest_qsa.engine.reduce.observer import StreamObserver
from support import models, oracle
from support.captures import statistics

EVERY_PATTERN = np.arange(65536, dtype=np.uint16)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
quick = settings(max_examples=60, deadline=None, database=None)


def numbers_of(*rows, dtype=torch.float32, statistics=ALL_STATISTICS):
    """Reduce rows [n] as one stream; rows of different lengths come as batches of their own."""
    observer = StreamObserver(statistics)
    for sample, row in enumerate(rows):
        observer.add(torch.as_tensor(row).to(dtype)[None], [None], [sample], 0, token_axis=False)
    return observer.numbers(statistics)


def truth(rows, dtype):
    return [torch.as_tensor(row).to(dtype).double().numpy() for row in rows]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_pattern_stands_for_its_own_value(dtype):
    values = bin_values(EVERY_PATTERN, dtype)
    exact = torch.from_numpy(EVERY_PATTERN.view(np.int16).copy()).view(DTYPES[dtype])
    np.testing.assert_array_equal(values, exact.double().numpy())
    finite = np.isfinite(values)
    back = torch.from_numpy(values).to(DTYPES[dtype]).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(back[finite], EVERY_PATTERN[finite])


def test_every_pattern_of_float32_stands_for_the_middle_of_its_values():
    values = bin_values(EVERY_PATTERN, "float32")
    finite = np.isfinite(values)
    assert finite.sum() == 65536 - 2 * 128
    with np.errstate(invalid="ignore"):  # signalling NaNs
        low, high = (
            ((EVERY_PATTERN.astype(np.uint32) << 16) | rest).view(np.float32).astype(np.float64) for rest in (0, 0xFFFF)
        )
    values, low, high = values[finite], low[finite], high[finite]
    normal = np.abs(low) >= np.finfo(np.float32).tiny
    for end in (low, high):
        assert np.all(np.abs(values - end)[normal] <= 2**-8 * np.abs(end)[normal])
    assert np.all(np.abs(values - low)[~normal] < 1e-38)


def test_the_patterns_of_infinity_and_nan_stay_what_they_are():
    assert bin_values(np.array([0x7F80, 0xFF80], dtype=np.uint16), "float32").tolist() == [np.inf, -np.inf]
    assert np.isnan(bin_values(np.array([0x7FC0], dtype=np.uint16), "float32")).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_patterns_are_counted_each_once(dtype, signed):
    row = torch.from_numpy(EVERY_PATTERN.view(np.int16).copy()).view(DTYPES[dtype])
    numbers = numbers_of(row, dtype=DTYPES[dtype])
    bins, counts = (numbers.signed_bins, numbers.signed_counts) if signed else (numbers.bins, numbers.counts)
    np.testing.assert_array_equal(bins, EVERY_PATTERN if signed else EVERY_PATTERN[:32768])
    assert set(counts.tolist()) == {1 if signed else 2}


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(data=st.data(), q=st.floats(0, 1), signed=st.booleans())
def test_a_quantile_from_counts_is_that_of_the_values(dtype, data, q, signed):
    width, bound = (16, 60000.0) if dtype == "float16" else (32, 2.0**100)
    elements = st.floats(-bound, bound, width=width, allow_subnormal=False)
    rows = data.draw(
        st.lists(npst.arrays(f"float{width}", st.integers(1, 40), elements=elements), min_size=1, max_size=3)
    )
    populations = truth(rows, DTYPES[dtype])
    got, want = (
        counted_quantile(numbers_of(*rows, dtype=DTYPES[dtype]), q, signed=signed),
        oracle.quantile(populations, q, signed),
    )
    if dtype == "float32":
        # each of the two neighbours is within 2⁻⁸ of its own value
        x = np.sort(oracle.pooled(populations) if signed else np.abs(oracle.pooled(populations)))
        rank = q * (len(x) - 1)
        near = max(abs(x[int(np.floor(rank))]), abs(x[min(int(np.floor(rank)) + 1, len(x) - 1)]))
        assert abs(got - want) <= 2**-8 * near + 1e-37
    else:
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.abs(oracle.pooled(populations)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 50))
def test_the_extremes_of_magnitudes_are_exact_whatever_the_dtype(dtype, seed, count):
    row = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    numbers = numbers_of(row, dtype=DTYPES[dtype])
    magnitudes = np.abs(truth([row], DTYPES[dtype])[0])
    assert counted_quantile(numbers, 1.0) == magnitudes.max()
    assert counted_quantile(numbers, 0.0) == magnitudes.min()


def test_the_signed_extremes_of_float32_are_exact():
    row = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    numbers = numbers_of(row)
    assert counted_quantile(numbers, 1.0, signed=True) == row.max()
    assert counted_quantile(numbers, 0.0, signed=True) == row.min()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_is_read_back_as_zero(dtype):
    row = np.array([0.0, -0.0, 0.0, -0.0, 0.0, 1.0, 2.0])
    numbers = numbers_of(row, dtype=DTYPES[dtype])
    assert counted_quantile(numbers, 0.5) == 0
    assert counted_quantile(numbers, 0.5, signed=True) == 0
    assert numbers.element_top[0, 3] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_counts_of_rows_add_up_to_those_of_the_whole(dtype, seed, lengths):
    rows = [np.random.default_rng([seed, i]).standard_t(1, n).astype(np.float32) for i, n in enumerate(lengths)]
    apart, whole = (numbers_of(*r, dtype=DTYPES[dtype]) for r in (rows, [np.concatenate(rows)]))
    for name in ("bins", "counts", "signed_bins", "signed_counts"):
        np.testing.assert_array_equal(getattr(apart, name), getattr(whole, name))
    assert apart.counts.sum() == sum(lengths)


def test_counts_of_magnitudes_are_the_same_with_and_without_the_signed_ones():
    row = np.random.default_rng(0).standard_normal(500)
    both, plain = numbers_of(row), numbers_of(row, statistics=ALL_STATISTICS - statistics("signed_counts"))
    np.testing.assert_array_equal(both.bins, plain.bins)
    np.testing.assert_array_equal(both.counts, plain.counts)
    assert "signed_counts" not in plain


@pytest.mark.parametrize("signed", [False, True])
def test_sorted_counts_ascend_and_put_nan_last(signed):
    values, counts = sorted_counts(
        numbers_of(np.array([3.0, float("nan"), -1.0, -1.0, 0.5]), dtype=torch.bfloat16), signed=signed
    )
    assert values[:-1].tolist() == ([-1.0, 0.5, 3.0] if signed else [0.5, 1.0, 3.0])
    assert np.isnan(values[-1])
    assert counts.tolist() == ([2, 1, 1, 1] if signed else [1, 2, 1, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_statistics_of_elements_equal_the_oracle(dtype):
    row = np.random.default_rng(3).standard_normal(51)
    got = numbers_of(row, dtype=DTYPES[dtype]).element_top[0]
    x = truth([row], DTYPES[dtype])[0][None]
    want = [oracle.magnitude(x, stat, None) for stat in ("top1", "top2", "top3", "median", "min3", "min2", "min")]
    np.testing.assert_array_equal(np.delete(got, 3), np.delete(np.array(want, dtype=np.float32), 3))
    np.testing.assert_allclose(got[3], want[3], rtol=2**-8 if dtype == "float32" else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_order_statistics_of_very_few_elements(dtype, count):
    top = numbers_of(np.arange(1, count + 1), dtype=DTYPES[dtype]).element_top[0]
    expected = [*(float(count - i) if i < count else np.nan for i in range(3))]
    np.testing.assert_array_equal(top[:3], expected)
    np.testing.assert_array_equal(top[:3:-1], [*(float(i + 1) if i < count else np.nan for i in range(3))])
    np.testing.assert_allclose(top[3], [1.0, 1.0, 2.0][count - 1], rtol=2**-8)


def test_a_distribution_through_a_model_and_a_file_is_the_same(tmp_path):
    model = models.Scripted(torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)))
    cap = capture(model, [models.numbered(model)], sites=[("0", "output")])
    cap.save(tmp_path / "a.qsa")
    loaded = type(cap).load(tmp_path / "a.qsa")
    for q in (0.0, 0.5, 0.9, 1.0):
        assert loaded.output("0").quantile(q).values == cap.output("0").quantile(q).values
