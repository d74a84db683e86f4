"""The band of each channel, from coarse counts, against numpy's percentiles of what the channel really held."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pytest_qsa import Capture, capture
from pytest_qsa.captures import ALL_STATISTICS, CHANNEL_COUNTS
from pytest_qsa.captures.distributions import SHARES
from pytest_qsa.common.errors import AnomalyError
from pytest_qsa.metrics.selection import NotMeasuredError
from support import models, oracle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
quick = settings(max_examples=25, deadline=None, database=None)


def outputs(values, dtype=torch.float32, mask=None, apart=1):
    """Capture the outputs of a scripted layer, [N, T, C], in batches of `apart` samples."""
    model = models.Scripted(torch.as_tensor(np.asarray(values), dtype=dtype))
    batches = [models.numbered(model, first, min(first + apart, len(values))) for first in range(0, len(values), apart)]
    if mask is not None:
        masks = torch.as_tensor(np.asarray(mask)).split(apart)
        batches = [{"input_ids": ids, "attention_mask": m} for ids, m in zip(batches, masks, strict=True)]
    return capture(model, batches, sites=[("0", "output")], statistics=["channel_band"]).output("0")


def bands(selection, signed=False):
    return selection.channel_bands(signed=signed)["layers.0"]


def assert_within_a_bin(selection, x, signed):
    """Every order statistic that numpy interpolates between may be off by 1/16, or by 2⁻²⁴; the ends are exact."""
    ordered = np.sort(x if signed else np.abs(x), axis=0)
    for name, share in SHARES.items():
        rank = share * (len(x) - 1)
        near = ordered[[int(np.floor(rank)), int(np.ceil(rank))]]
        slack = np.abs(near).max(axis=0) / 16 + 2.0**-24
        want = np.quantile(ordered, share, axis=0)
        exact = 0.0 if name in ("min", "max") else slack
        assert (np.abs(bands(selection, signed)[name] - want) <= exact).all(), name


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 5)),
    spread=st.sampled_from([0, 1, 6]),
)
def test_a_percentile_of_a_channel_is_within_its_bin_and_the_extremes_are_exact(dtype, signed, seed, shape, spread):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-spread, spread, shape)
    values[rng.random(shape) < 0.2] = 0
    values = torch.as_tensor(values).clamp(-60000, 60000).to(DTYPES[dtype])
    x = values.double().numpy().reshape(-1, shape[2])
    assert_within_a_bin(outputs(x.reshape(shape), DTYPES[dtype]), x, signed)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_channel_outside_the_range_of_the_bins_keeps_its_extremes(scale, signed):
    x = np.random.default_rng(0).standard_normal((1, 50, 3)).astype(np.float32) * np.float32(scale)
    found = bands(outputs(x), signed)
    reference = x[0] if signed else np.abs(x[0])
    np.testing.assert_array_equal(found["min"], reference.min(axis=0))
    np.testing.assert_array_equal(found["max"], reference.max(axis=0))
    assert all((found["min"] <= band).all() and (band <= found["max"]).all() for band in found.values())


def test_what_is_larger_than_the_bins_is_taken_as_evenly_spread_up_to_the_largest():
    found = bands(outputs(np.linspace(1e12, 5e12, 101)[None, :, None]))
    np.testing.assert_allclose([found[name][0] for name in ("p25", "p75")], [2e12, 4e12], rtol=0.01)


def test_a_smooth_distribution_is_read_far_more_exactly_than_the_bound():
    x = np.random.default_rng(0).standard_normal((8, 2000, 4))
    found = bands(outputs(x), signed=True)
    for name in ("p1", "p25", "p75", "p99"):
        np.testing.assert_allclose(found[name], np.quantile(x.reshape(-1, 4), SHARES[name], axis=0), rtol=0.01)


def test_a_channel_that_is_mostly_zero_has_percentiles_that_are_zero():
    x = np.maximum(np.random.default_rng(0).standard_normal((2, 100, 3)) - 1, 0)
    for signed in (False, True):
        assert (bands(outputs(x), signed)["p75"] == 0).all()


@quick
@given(seed=st.integers(0, 2**32 - 1), samples=st.integers(2, 6), apart=st.integers(1, 6))
def test_batches_and_the_order_of_samples_change_nothing(seed, samples, apart):
    x = np.random.default_rng(seed).standard_t(2, (samples, 7, 3))
    first, second = (s.capture.sites["layers.0", "output"] for s in (outputs(x), outputs(x[::-1].copy(), apart=apart)))
    for name in ("channel_bins", "channel_counts", "channel_extremes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@quick
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, 5))
def test_counts_of_disjoint_samples_add_up_to_those_of_all(seed, cut):
    x = np.random.default_rng(seed).standard_t(1, (6, 5, 4))
    whole, *parts = (outputs(v).capture.sites["layers.0", "output"] for v in (x, x[:cut], x[cut:]))
    added = np.zeros((65536, 4), dtype=np.int64)
    for part in parts:
        added[part.channel_bins] += part.channel_counts
    np.testing.assert_array_equal(np.flatnonzero(added.any(axis=1)), whole.channel_bins)
    np.testing.assert_array_equal(added[whole.channel_bins], whole.channel_counts)


def test_padding_is_in_no_channel():
    x = np.random.default_rng(0).standard_normal((2, 6, 3))
    x[0, :2], x[1, 5] = 1e6, float("nan")
    mask = np.ones((2, 6), dtype=int)
    mask[0, :2] = mask[1, 5] = 0
    kept = torch.as_tensor(x).float().double().numpy()[mask.astype(bool)]
    assert_within_a_bin(outputs(x, mask=mask), kept, True)


@pytest.mark.parametrize("across", ["max", "median", "min", "mean"])
@pytest.mark.parametrize("signed", [False, True])
def test_the_metric_folds_the_channels(across, signed):
    x = np.random.default_rng(0).standard_normal((3, 400, 6)) * np.arange(1, 7)
    for stat in ("max", "p99", "min"):
        value = outputs(x).channel_band(stat, across=across, signed=signed).values
        np.testing.assert_allclose(value, oracle.channel_band(x, stat, across, signed), rtol=0.02, atol=1e-6)


def test_a_weight_has_channels_as_well():
    model = models.llama()
    cap = capture(model, [models.token_batch(1, 5)], sites=[("q_proj$", "weight")], statistics=["channel_band"])
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().double().numpy()
    found = cap.weight("q_proj$").channel_bands()["model.layers.0.self_attn.q_proj"]
    np.testing.assert_array_equal(found["max"], np.abs(weight).max(axis=0))
    np.testing.assert_allclose(found["p25"], np.quantile(np.abs(weight), 0.25, axis=0), rtol=1 / 16)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_channel_with_a_non_finite_value_is_no_number(poison):
    x = np.ones((2, 6, 3))
    x[1, 2, 1] = poison
    for signed in (False, True):
        assert all(np.isnan(band).tolist() == [False, True, False] for band in bands(outputs(x), signed).values())
    with pytest.raises(AnomalyError, match="not finite"):
        _ = outputs(x).channel_band(across="median") <= 9


def test_only_a_site_that_asks_pays_for_it():
    assert CHANNEL_COUNTS not in ALL_STATISTICS
    model = models.Scripted(torch.ones(1, 4, 3))
    cap = capture(model, [models.numbered(model)], sites=[("0", "output")])
    with pytest.raises(NotMeasuredError, match="channel_counts"):
        cap.output("0").channel_band()


def test_a_site_without_tokens_is_an_error_that_names_what_works():
    model = models.ConvNet()
    cap = capture(model, [torch.randn(2, 3, 8, 8)], sites=[("conv", "output")], statistics=["channel_band"])
    for ask in (lambda: cap.output("conv").channel_band(), lambda: cap.output("conv").channel_bands()):
        with pytest.raises(AnomalyError, match=r"token axis.*elementwise"):
            ask()


def test_the_bands_survive_the_file(tmp_path):
    selection = outputs(np.random.default_rng(0).standard_normal((2, 30, 3)))
    selection.capture.save(tmp_path / "a.qsa")
    loaded = Capture.load(tmp_path / "a.qsa").output("0")
    for name, band in bands(selection, True).items():
        np.testing.assert_array_equal(bands(loaded, True)[name], band)
