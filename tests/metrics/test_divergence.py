"""The distance of two captures' distributions, against numpy on the values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pytest_qsa import capture
from pytest_qsa.common.errors import AnomalyError
from pytest_qsa.metrics.divergence import ks, psi, wasserstein
from support import models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
quick = settings(max_examples=25, deadline=None, database=None)
PAIR = {"seed": st.integers(0, 2**32 - 1), "sizes": st.tuples(st.integers(1, 60), st.integers(1, 60))}


def captured(x, dtype=torch.bfloat16, statistics=("quantile",)):
    model = models.Scripted(torch.as_tensor(np.asarray(x)).to(dtype).reshape(1, -1, 1))
    return capture(model, [models.numbered(model)], sites=[("0", "output")], statistics=list(statistics))


def samples(seed, sizes, dtype=torch.bfloat16, discrete=False):
    rng = np.random.default_rng(seed)
    drawn = [rng.standard_normal(n) * rng.uniform(0.5, 2) for n in sizes]
    drawn = [np.round(x) for x in drawn] if discrete else drawn
    return [torch.as_tensor(x).to(dtype).double().numpy() for x in drawn]


def share_below(x, values):
    return np.mean(np.abs(x)[None] <= values[:, None], axis=1)


def plain_ks(a, b):
    values = np.abs(np.concatenate([a, b]))
    return np.abs(share_below(a, values) - share_below(b, values)).max()


def plain_wasserstein(a, b):
    """Pair the sorted values one to one, each repeated until there are equally many."""
    a, b = (np.repeat(np.sort(np.abs(x)), repeat) for x, repeat in ((a, len(b)), (b, len(a))))
    return np.mean(np.abs(a - b))


def plain_psi(a, b, bins=10):
    ends = np.unique(np.quantile(np.abs(a), np.arange(1, bins) / bins, method="inverted_cdf"))
    p, q = (np.maximum(np.bincount(np.searchsorted(ends, np.abs(x)), minlength=len(ends) + 1) / len(x), 1e-4)
            for x in (a, b))  # fmt: skip
    return np.sum((p - q) * np.log(p / q))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@quick
@given(**PAIR, discrete=st.booleans())
def test_the_distances_of_16_bit_captures_are_exact(dtype, seed, sizes, discrete):
    a, b = samples(seed, sizes, DTYPES[dtype], discrete)
    old, new = (captured(x, DTYPES[dtype]) for x in (a, b))
    np.testing.assert_allclose(ks(old, new, "0", "output").values, [plain_ks(a, b)], 1e-12, 1e-15)
    np.testing.assert_allclose(wasserstein(old, new, "0", "output").values, [plain_wasserstein(a, b)], 1e-9, 1e-15)
    if len(a) % 10:  # where a tenth falls on a value, the two ways round it differently
        np.testing.assert_allclose(psi(old, new, "0", "output").values, [plain_psi(a, b)], 1e-9, 1e-15)


def test_the_distances_of_float32_captures_are_near_and_say_that_they_are_estimated():
    a, b = samples(0, (20000, 30000), torch.float32)
    old, new = (captured(x, torch.float32) for x in (a, b))
    for distance, plain in ((ks, plain_wide_ks), (psi, plain_psi), (wasserstein, wide_wasserstein)):
        series = distance(old, new, "0", "output")
        np.testing.assert_allclose(series.values, [plain(a, b)], rtol=0.02)
        assert "estimated" in str(series.query)
    assert "estimated" not in str(ks(captured(a), captured(b), "0", "output").query)


def plain_wide_ks(a, b):
    values = np.sort(np.abs(np.concatenate([a, b])))
    return np.abs(
        np.searchsorted(np.sort(np.abs(a)), values, "right") / len(a)
        - np.searchsorted(np.sort(np.abs(b)), values, "right") / len(b)
    ).max()


def wide_wasserstein(a, b):
    shares = (np.arange(100000) + 0.5) / 100000
    return np.mean(np.abs(np.quantile(np.abs(a), shares) - np.quantile(np.abs(b), shares)))


@pytest.mark.parametrize("distance", [ks, psi, wasserstein])
def test_a_capture_is_at_no_distance_from_itself_and_a_larger_shift_is_farther(distance):
    (a,) = samples(3, (500,))
    at = [distance(captured(a), captured(a * scale), "0", "output").values[0] for scale in (1, 1.25, 2)]
    assert at[0] == 0
    assert at[0] < at[1] < at[2]


def test_a_relative_distance_does_not_depend_on_the_scale():
    a, b = samples(1, (300, 300))
    one, other = (wasserstein(captured(a * k), captured(b * k), "0", "output", relative=True).values for k in (1, 64))
    np.testing.assert_allclose(one, plain_wasserstein(a, b) / np.abs(a).mean(), rtol=1e-9)
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_bins_of_psi_are_those_asked_for():
    a, b = samples(2, (101, 57))
    for bins in (2, 3, 7):
        got = psi(captured(a), captured(b), "0", "output", bins=bins).values
        np.testing.assert_allclose(got, [plain_psi(a, b, bins)], rtol=1e-9)
    with pytest.raises(ValueError, match="bins is 2 or more"):
        psi(captured(a), captured(b), "0", "output", bins=1)


@pytest.mark.parametrize("distance", [ks, psi, wasserstein])
def test_a_non_finite_value_on_either_side_is_an_anomaly(distance):
    a, bad = captured([1.0, 2.0, 3.0]), captured([1.0, float("nan"), 2.0])
    for pair in ((a, bad), (bad, a), (a, captured([1.0, float("inf")]))):
        with pytest.raises(AnomalyError, match="one of the two captures holds NaN or Inf"):
            _ = distance(*pair, "0", "output") <= 1e9


def test_what_cannot_be_compared_is_an_error():
    a = captured([1.0, 2.0])
    with pytest.raises(AnomalyError, match="name quantile among the statistics"):
        ks(a, captured([1.0], statistics=["rms"]), "0", "output")
    two = models.Scripted(torch.ones(1, 3, 2), torch.ones(1, 3, 2))
    other = capture(two, [models.numbered(two)], sites=[("layers", "output")])
    with pytest.raises(AnomalyError, match=r"layers\.1 are in one of them only"):
        ks(a, other, "layers", "output")
    with pytest.raises(AnomalyError, match="no layer matches"):
        ks(a, a, "nowhere", "output")
