"""Every metric against tests/support/oracle.py, on activations that plain hooks record from a Llama, and scripted."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from pytest_qsa import capture
from pytest_qsa.captures import Massive
from pytest_qsa.common.errors import AnomalyError
from pytest_qsa.metrics import METRICS, Bounds, Query, Series, canonical_positions
from pytest_qsa.metrics.registry import AGGREGATIONS
from support import models, oracle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYERS = [f"model.layers.{index}.mlp.down_proj" for index in range(4)]
PATTERN = r"mlp\.down_proj$"
OF_ONE_TENSOR = [
    name
    for name, metric in METRICS.items()
    if not metric.against and "output" in metric.sites and name != "engine_gap"  # of two engines: test_engines.py
]
PADDINGS = ("none", "left", "right")
EVERY = OF_ONE_TENSOR
SOME_STATISTICS = [
    "outlier_tokens",
    "magnitude",
    "kurtosis",
    "quantile",
    "absmax",
    "channel_band",
    "int8_outlier_features",
    ("massive_activations", {"abs": 0.5, "ratio": 5.0}),
]


@cache
def measured(dtype="float32", padding="none"):
    """Return (capture, {(layer, site): populations}) of a Llama with a BOS that is a sink."""
    model = models.llama(DTYPES[dtype], sink=True)
    if padding == "none":
        batches, mask = [models.token_batch(3, 17, seed=1, bos=True), models.token_batch(2, 16, seed=2, bos=True)], None
    else:
        batches = [models.padded_batch([14, 9, 4], padding, bos=True), models.padded_batch([11, 11], padding, seed=9)]
        mask = "attention_mask"
    sites = [(PATTERN, "input"), (PATTERN, "output"), (PATTERN, "weight"), (r"layers\.\d+$", "output")]
    cap = capture(model, batches, sites=sites, statistics=SOME_STATISTICS)
    populations = {
        (layer, site): models.record(model, batches, layer, site, mask=mask)
        for site in ("input", "output")
        for layer in [*LAYERS, *(f"model.layers.{index}" for index in range(4))]
    }
    populations |= {
        (layer, "weight"): [model.get_submodule(layer).weight.detach().double().numpy()] for layer in LAYERS
    }
    return cap, populations


def expected(populations, site, name, pattern=LAYERS, **how):
    return [oracle.metric(name, populations[layer, site], **how) for layer in pattern]


PER_SAMPLE = [
    ("outlier_tokens", {"threshold": 64.0}),
    ("outlier_tokens", {"threshold": 1.5}),
    ("outlier_tokens", {"threshold": 1.0}),
    ("outlier_ratio", {}),
    ("kurtosis", {}),
    ("nonfinite", {}),
    *(
        ("magnitude", {"stat": stat, "reduce_dim": dim})
        for stat in ("top1", "top2", "top3", "median", "min", "min2", "min3")
        for dim in (-1, -2, None)
    ),
]
POOLED = [
    ("absmax", {}),
    ("rms", {}),
    ("mean", {}),
    ("std", {}),
    ("crest_factor", {}),
    ("zero_fraction", {}),
    *(("quantile", {"q": q, "signed": signed}) for q in (0.0, 0.01, 0.5, 0.77, 0.999, 1.0) for signed in (False, True)),
    *(("headroom", {"dtype": dtype}) for dtype in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")),
]


def label(case):
    name, parameters = case
    return "-".join([name, *map(str, parameters.values())])


def tolerance(name, parameters, dtype):
    """Return (rtol, atol): counted statistics of float32 are within 2⁻⁸, maxima exact, moments near to float32."""
    approximate = name == "quantile" and (parameters["signed"] or 0 < parameters["q"] < 1)
    approximate |= name == "magnitude" and parameters["reduce_dim"] is None and parameters["stat"] == "median"
    if approximate and dtype == "float32":
        return 2**-8, 1e-12
    if name in ("kurtosis", "mean", "rms", "std", "crest_factor"):
        return 1e-5, 1e-9
    return (1e-12, 0) if name in ("quantile", "outlier_tokens") else (1e-6, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", ["input", "output"])
@pytest.mark.parametrize("case", PER_SAMPLE, ids=label)
def test_a_metric_of_samples_equals_the_oracle_under_every_reduction(case, site, dtype):
    name, parameters = case
    cap, populations = measured(dtype)
    rtol, atol = tolerance(name, parameters, dtype)
    for how in (None, *AGGREGATIONS):
        series = getattr(cap.select(PATTERN, site), name)(**parameters, reduce=how)
        assert series.layers == LAYERS
        np.testing.assert_allclose(
            series.values, expected(populations, site, name, reduce=how, **parameters), rtol, atol, err_msg=str(how)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", ["input", "output", "weight"])
@pytest.mark.parametrize("case", POOLED, ids=label)
def test_a_pooled_metric_equals_the_oracle(case, site, dtype):
    name, parameters = case
    cap, populations = measured(dtype)
    values = getattr(cap.select(PATTERN, site), name)(**parameters).values
    rtol, atol = tolerance(name, parameters, dtype)
    np.testing.assert_allclose(values, expected(populations, site, name, **parameters), rtol, atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stat", ["top1", "top2", "top3", "median", "min", "min2", "min3"])
def test_a_weight_is_reduced_over_its_outputs_unless_the_other_axis_is_named(stat, dtype):
    cap, populations = measured(dtype)
    weights = cap.weight(PATTERN)
    for values, dim in (
        (weights.magnitude(stat), -2),
        (weights.magnitude(stat, reduce_dim=-2), -2),
        (weights.magnitude(stat, reduce_dim=-1), -1),
        (weights.magnitude(stat, reduce_dim=None), None),
    ):
        rtol = 2**-8 if (dim, dtype, stat) == (None, "float32", "median") else 1e-6
        want = expected(populations, "weight", "magnitude", stat=stat, reduce_dim=dim)
        np.testing.assert_allclose(values.values, want, rtol)


@pytest.mark.parametrize("case", [("kurtosis", {}), ("nonfinite", {})], ids=label)
def test_an_elementwise_metric_of_samples_takes_a_weight_as_one_sample(case):
    cap, populations = measured("bfloat16")
    values = getattr(cap.weight(PATTERN), case[0])().values
    np.testing.assert_allclose(values, expected(populations, "weight", case[0]), 1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("site", ["input", "output"])
@pytest.mark.parametrize(
    "case", [case for case in PER_SAMPLE + POOLED if case[1].get("stat") not in ("top2", "min2")], ids=label
)
def test_padding_counts_in_no_metric(case, site, padding):
    name, parameters = case
    cap, populations = measured("bfloat16", padding)
    values = getattr(cap.select(PATTERN, site), name)(**parameters).values
    rtol, atol = tolerance(name, parameters, "bfloat16")
    np.testing.assert_allclose(values, expected(populations, site, name, **parameters), rtol, atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("site", ["input", "output"])
def test_massive_activations_of_their_own_thresholds_equal_the_oracle(site, padding, dtype):
    cap, populations = measured(dtype, padding)
    values = cap.select(PATTERN, site).massive_activations(abs=0.5, ratio=5.0, reduce="sum").values
    for value, layer in zip(values, LAYERS, strict=True):
        # float32 knows its median within 2⁻⁸, so the count is between those of the two ends
        slack = 2**-8 if dtype == "float32" else 0.0
        low, high = (
            sum(
                oracle.massive_activations(x, 0.5, 5.0, oracle.lower_median(np.abs(x)) * (1 + side * slack))
                for x in populations[layer, site]
            )
            for side in (1, -1)
        )
        assert low <= value <= high
    assert values.sum() > 0


def test_massive_activations_need_both_thresholds_and_include_the_ratio_itself():
    values = torch.ones(1, 4, 8, dtype=torch.bfloat16)
    values[0, 0, 0] = 100.0  # not above 100
    values[0, 1, 1] = -128.0  # exactly 128 × the median
    model = models.Scripted(values)
    for thresholds, count in (((100.0, 128.0), 1), ((99.0, 100.0), 2), ((99.0, 129.0), 0), ((128.0, 1.0), 0)):
        parameters = dict(zip(("abs", "ratio"), thresholds, strict=True))
        cap = capture(
            model, [models.numbered(model)], sites=[("0", "output")], statistics=[("massive_activations", parameters)]
        )
        assert cap.output("0").massive_activations(**parameters).values == [count]


def test_massive_thresholds_keep_all_their_digits():
    values = torch.ones(1, 2, 4)
    values[0, 0, 0] = 1234567.0
    model = models.Scripted(values)
    for threshold, count in ((1234566.0, 1), (1234568.0, 0)):
        wanted = {"abs": threshold, "ratio": 1.0}
        cap = capture(
            model, [models.numbered(model)], sites=[("0", "output")], statistics=[("massive_activations", wanted)]
        )
        assert cap.output("0").massive_activations(**wanted).values == [count]
    assert Massive(1234566.0, 1.0) != Massive(1234568.0, 1.0)


# The traps that metrics.md names, one by one.


def outputs(*script, statistics=EVERY, dtype=torch.float32, mask=None):
    """Capture the outputs of a scripted model: `script[layer][sample]` is [T, C]."""
    model = models.Scripted(*(torch.as_tensor(np.asarray(values), dtype=dtype) for values in script))
    ids = models.numbered(model)
    batch = ids if mask is None else {"input_ids": ids, "attention_mask": torch.as_tensor(mask)}
    return capture(model, [batch], sites=[(r"layers", "output")], statistics=statistics).output("layers")


def tokens_of(*maxima):
    """Return [T, 2] whose token-wise maxima are these."""
    return [[-float(m), float(m) / 2] for m in maxima]


def test_a_token_on_the_threshold_is_no_outlier():
    assert outputs([tokens_of(1, 1, 1, 64)]).outlier_tokens(64).values == [0]
    assert outputs([tokens_of(1, 1, 1, np.nextafter(np.float32(64), 65))]).outlier_tokens(64).values == [1]


def test_the_median_of_an_even_count_is_the_lower_one():
    series = outputs([tokens_of(1, 2, 100, 128)])
    assert series.magnitude("median").values == [2]
    assert series.outlier_ratio().values == [64]
    assert series.outlier_tokens(63.9).values == [1]


def test_the_median_is_of_the_sample_and_not_of_all_samples():
    assert outputs([tokens_of(1, 1, 1, 80), tokens_of(100, 100, 100, 100)]).outlier_tokens(reduce="sum").values == [1]


def test_a_ratio_is_taken_before_it_is_averaged():
    assert outputs([tokens_of(1, 1, 4), tokens_of(10, 10, 20)]).outlier_ratio(reduce="mean").values == [3]


def test_the_channels_beside_the_largest_do_not_change_a_token():
    wide = np.tile([[3.0, 0.1, -7.0]], (4, 1))
    assert outputs([wide]).magnitude("median").values == [7]


def test_too_few_tokens_for_an_order_statistic_is_an_anomaly():
    series = outputs([tokens_of(1, 2)]).magnitude("top3")
    with pytest.raises(AnomalyError, match=r"magnitude is not finite at layers\.0"):
        series.check()


def test_moments_do_not_cancel_beside_a_large_mean():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((2, 16, 32)) + 1000).astype(np.float32)
    site = outputs(values)
    np.testing.assert_allclose(site.std().values, oracle.std(values), 1e-5)
    np.testing.assert_allclose(site.kurtosis().values, [np.mean([oracle.kurtosis(x) for x in values])], 1e-4)


def test_pooled_moments_are_no_average_of_averages():
    values = np.stack([np.full((4, 2), 1.0), np.full((4, 2), 5.0)])
    site = outputs(values, mask=[[1, 1, 1, 1], [1, 0, 0, 0]])
    np.testing.assert_allclose(site.mean().values, [(8 * 1 + 2 * 5) / 10], 1e-12)
    np.testing.assert_allclose(site.std().values, [np.std([1.0] * 8 + [5.0] * 2)], 1e-12)
    np.testing.assert_allclose(site.rms().values, [np.sqrt((8 + 50) / 10)], 1e-12)


@pytest.mark.parametrize("constant", [0.1, 1 / 3, -7.7, 1e-3])
def test_a_constant_has_no_spread(constant):
    values = np.full((2, 7, 11), constant, dtype=np.float32)
    site = outputs(values)
    np.testing.assert_allclose(site.std().values, [0.0], atol=1e-8)
    np.testing.assert_allclose(site.rms().values, [abs(np.float32(constant))], 1e-6)


@pytest.mark.parametrize("scale", [1e-15, 1e-9, 1e9, 1e15])
def test_the_shape_of_a_distribution_does_not_depend_on_its_scale(scale):
    values = np.random.default_rng(0).standard_normal((1, 8, 32))
    site = outputs((values * scale).astype(np.float32))
    np.testing.assert_allclose(site.kurtosis().values, [oracle.kurtosis(values)], 1e-4)
    np.testing.assert_allclose(site.std().values / scale, [oracle.std(values)], 1e-5)
    np.testing.assert_allclose(site.crest_factor().values, [oracle.crest_factor(values)], 1e-5)


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 9), st.integers(1, 6))
def test_any_shape_equals_the_oracle(seed, samples, length, width):
    rng = np.random.default_rng(seed)
    values = (rng.standard_t(2, (samples, length, width)) * 10.0 ** rng.integers(-3, 3)).astype(np.float16)
    mask = rng.integers(0, 2, (samples, length))
    mask[:, rng.integers(length)] = 1
    site = outputs(values, dtype=torch.float16, mask=mask)
    populations = [x[keep.astype(bool)] for x, keep in zip(values, mask, strict=True)]
    for name, parameters, how in (
        ("outlier_tokens", {"threshold": 3.0}, "sum"),
        ("magnitude", {"stat": "median", "reduce_dim": -1}, "sum"),
        ("magnitude", {"stat": "median", "reduce_dim": -2}, "p95"),
        ("magnitude", {"stat": "median", "reduce_dim": None}, "mean"),
        ("magnitude", {"stat": "min", "reduce_dim": None}, "max"),
        ("absmax", {}, None),
        ("zero_fraction", {}, None),
        ("quantile", {"q": float(rng.random()), "signed": bool(rng.integers(2))}, None),
    ):
        values_ = (
            getattr(site, name)(**parameters, reduce=how).values if how else getattr(site, name)(**parameters).values
        )
        np.testing.assert_allclose(values_, [oracle.metric(name, populations, how, **parameters)], 1e-6, 1e-9)


# Non-finite values and dead layers: never a number that passes.


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", [name for name in OF_ONE_TENSOR if name not in ("nonfinite", "sink_tokens", "expert_tokens")]
)
def test_one_non_finite_element_makes_every_metric_but_their_count_an_anomaly(name, poison, dtype):
    values = np.random.default_rng(0).standard_normal((2, 6, 4))
    values[1, 3, 2] = poison
    site = outputs(values, dtype=dtype)
    variants = [p for n, p in PER_SAMPLE + POOLED if n == name] or [{}]
    for parameters in variants:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            series = getattr(site, name)(**parameters)
        with pytest.raises(AnomalyError, match=r"not finite at (layers\.0|whole of 1 layers)"):
            print(parameters, series <= 1e30)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("how", ["sum", "max"])
def test_non_finite_elements_are_counted(how, dtype):
    values = np.zeros((2, 6, 4))
    values[0, 0, 0], values[1, 3, 2], values[1, 4, 1] = float("nan"), float("inf"), float("-inf")
    assert outputs(values, dtype=dtype).nonfinite(reduce=how).values == [{"sum": 3, "max": 2}[how]]


@pytest.mark.parametrize("statistics", ["all", ["outlier_tokens"]], ids=["all", "tokens"])
def test_the_reason_names_the_sample_and_the_position_of_a_nan(statistics):
    values = np.ones((3, 6, 4))
    values[2, 4, 1] = float("nan")
    series = outputs(values, statistics=statistics).outlier_tokens()
    with pytest.raises(AnomalyError, match=r"sample 2.*position 4"):
        series.check()


def test_padding_may_hold_anything():
    values = np.ones((1, 4, 2))
    values[0, 0] = float("nan")
    site = outputs(values, mask=[[0, 1, 1, 1]])
    assert site.outlier_ratio().values == [1]
    assert site.nonfinite().values == [0]
    assert site.absmax().values == [1]


@pytest.mark.parametrize("name", ["outlier_tokens", "outlier_ratio", "kurtosis", "crest_factor"])
def test_a_dead_layer_has_nothing_to_compare(name):
    site = outputs(np.zeros((2, 5, 4)), np.ones((2, 5, 4)) * np.arange(5)[:, None])
    series = getattr(site, name)()
    with pytest.raises(AnomalyError, match=r"layers\.0"):
        _ = series <= 1e9
    assert site.magnitude("top1").values.tolist() == [0, 4]
    assert site.zero_fraction().values.tolist() == [1, 0.2]


def test_the_reason_says_that_all_values_are_zero():
    series = outputs(np.zeros((1, 5, 4)), statistics=["outlier_tokens"]).outlier_tokens()
    with pytest.raises(AnomalyError, match="all values of sample 0 are zero"):
        series.check()


COUNTS_ABOVE = ("massive_activations", "int8_outlier_features")
"""What these keep doesn't tell zeros; the request of a suite asks for more."""


@pytest.mark.parametrize("name", [name for name in OF_ONE_TENSOR if name not in ("expert_tokens", "sink_tokens")])
def test_zeros_alone_meet_no_bound_but_that_on_zeros(name):
    statistics = [name, "absmax"] if name in COUNTS_ABOVE else [name]
    dead = getattr(outputs(np.zeros((2, 5, 4)), statistics=statistics), name)()
    if name == "zero_fraction":
        assert dead <= 1
        return
    with pytest.raises(AnomalyError, match="zero"):
        assert dead <= 1000
    with pytest.raises(AnomalyError):
        dead.require(max=1000)


def test_a_layer_of_zeros_beside_a_living_one_may_be():
    values = np.zeros((2, 5, 4))
    values[0, 3, 2] = 1e-30
    assert outputs(values, statistics=["absmax"]).absmax() <= 1


# Arguments.


@pytest.mark.parametrize("name", [name for name in OF_ONE_TENSOR if name != "expert_tokens"])
def test_every_metric_is_a_method_with_the_defaults_of_its_definition(name):
    cap, _ = measured()
    if name == "massive_activations":
        series = cap.output(PATTERN).massive_activations(0.5, 5.0)
        assert METRICS[name].parameters["abs"].default == 100.0
        assert METRICS[name].parameters["ratio"].default == 1000.0
    else:
        series = getattr(cap.output(PATTERN), name)()
        assert dict(series.query.parameters) == {key: p.default for key, p in METRICS[name].parameters.items()}
    assert series.query.reduce == METRICS[name].reduce
    assert series.query.definition == f"{name}/1"
    assert series.values.dtype == np.float64


@pytest.mark.parametrize("name", [name for name in oracle.DEFAULT_REDUCE if name != "massive_activations"])
def test_the_default_reduction_is_that_of_the_definition(name):
    assert METRICS[name].reduce == oracle.DEFAULT_REDUCE[name]


@pytest.mark.parametrize("stat", ["max", "mean", "top4", "min4", ""])
def test_an_unknown_stat_is_an_error_and_not_another_statistic(stat):
    cap, _ = measured()
    with pytest.raises(ValueError, match="stat"):
        cap.output(PATTERN).magnitude(stat)


@pytest.mark.parametrize("q", [-0.1, 1.5, 99.9])
def test_a_quantile_outside_0_and_1_is_an_error(q):
    cap, _ = measured()
    with pytest.raises(ValueError, match="quantile: q is between 0 and 1"):
        cap.output(PATTERN).quantile(q)


def test_a_pooled_metric_takes_no_reduction():
    cap, _ = measured()
    with pytest.raises(TypeError):
        cap.output(PATTERN).rms(reduce="mean")
    with pytest.raises(ValueError, match="reduce"):
        cap.output(PATTERN).series("rms", "mean")


@pytest.mark.parametrize("dim", [-2, None])
def test_positions_that_a_reduction_cannot_honour_are_an_error(dim):
    cap, _ = measured()
    with pytest.raises(ValueError, match="positions"):
        cap.output(PATTERN).magnitude("top1", reduce_dim=dim, positions="no_sink")


def test_a_weight_has_no_positions():
    cap, _ = measured()
    with pytest.raises(ValueError, match="positions"):
        cap.weight(PATTERN).magnitude("top1", reduce_dim=-1, positions={"skip_first": 3})


@pytest.mark.parametrize(
    "positions", ["none", "skip_first", "skip_first:", "skip_first:-1", {"skip_first": -1}, {}, {"first": 1}]
)
def test_unknown_positions_are_an_error(positions):
    with pytest.raises(ValueError, match="one of all, no_sink, sink"):
        canonical_positions(positions)


def test_outlier_tokens_of_a_weight_are_an_error_that_names_what_works():
    cap, _ = measured()
    with pytest.raises(AnomalyError, match=r"token axis.*weight of model\.layers\.0.*elementwise"):
        cap.weight(PATTERN).outlier_tokens()


# Series: comparisons.


def series_of(*values, layers=None):
    layers = [f"l{index}" for index in range(len(values))] if layers is None else layers
    return Series(layers, np.array(values, dtype=np.float64), Query("absmax", "absmax/1", "output", "l"))


@pytest.mark.parametrize(
    ("bound", "at_most", "at_least", "below", "above"),
    [
        (0.5, False, True, False, True),
        (1, False, True, False, False),
        (2, True, False, False, False),
        (3.5, True, False, True, False),
    ],
)
def test_a_comparison_asks_whether_every_layer_satisfies_it(bound, at_most, at_least, below, above):
    series = series_of(1.0, 2.0)
    assert (series <= bound) is at_most
    assert (series >= bound) is at_least
    assert (series < bound) is below
    assert (series > bound) is above
    assert (bound >= series) is at_most


def test_equality_means_that_every_layer_has_the_value():
    assert (series_of(2.0, 2.0) == 2) is True
    assert (series_of(2.0, 2.0 + 1e-15) == 2) is False


@pytest.mark.parametrize("value", [1.0, 0.0, -1.0, 1e300])
def test_a_value_next_to_the_bound_is_out_of_bounds(value):
    above, below = np.nextafter(value, np.inf), np.nextafter(value, -np.inf)
    assert Bounds(max=value).excess(above) > 0
    assert Bounds(min=value).excess(below) < 0
    assert Bounds(equals=value).excess(above) > 0
    assert Bounds(equals=value).excess(below) < 0
    assert Bounds(max=value, strict=True).excess(value) > 0
    assert Bounds(min=value, strict=True).excess(value) < 0
    assert Bounds(min=value, max=value).excess(value) == 0


@pytest.mark.parametrize("compare", ["__le__", "__ge__", "__lt__", "__gt__", "__eq__"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_comparison_with_a_non_finite_layer_raises(compare, value):
    with pytest.raises(AnomalyError, match="absmax is not finite at l1"):
        getattr(series_of(1.0, value), compare)(2.0)


@pytest.mark.parametrize("compare", ["__le__", "__ge__", "__lt__", "__gt__", "__eq__"])
def test_a_comparison_of_nothing_raises(compare):
    with pytest.raises(AnomalyError, match="empty"):
        getattr(series_of(), compare)(2.0)


@pytest.mark.parametrize("compare", ["__le__", "__ge__", "__lt__", "__gt__", "__eq__"])
def test_a_bound_that_is_nan_raises(compare):
    with pytest.raises((AnomalyError, ValueError), match="NaN"):
        getattr(series_of(1.0, 2.0), compare)(float("nan"))


@pytest.mark.parametrize("bound", [np.int64(2), np.float32(2), np.float64(2)], ids=repr)
def test_a_number_of_numpy_is_a_bound(bound):
    assert (series_of(2.0, 2.0) == bound) is True
    assert (series_of(2.0, 3.0) == bound) is False
    assert (series_of(2.0, 2.0) <= bound) is True
    assert (series_of(2.0, 3.0) <= bound) is False


@pytest.mark.parametrize("other", ["2", None, [2.0, 2.0], "series"])
def test_equality_with_what_is_no_number_is_never_just_false(other):
    other = series_of(2.0, 2.0) if other == "series" else other
    with pytest.raises(TypeError):
        _ = series_of(2.0, 2.0) == other


def test_not_equal_and_truth_have_no_meaning():
    with pytest.raises(TypeError, match="<="):
        _ = series_of(1.0) != 1.0
    with pytest.raises(TypeError, match="neither true nor false"):
        bool(series_of(1.0))


@pytest.mark.parametrize(("over", "value"), [("sum", 6.0), ("max", 3.0), ("mean", 2.0)])
def test_over_folds_the_layers_into_one_number(over, value):
    folded = series_of(1.0, 2.0, 3.0).folded(over)
    assert folded.values.tolist() == [value]
    assert folded.layers == [f"{over} of 3 layers"]
    assert folded.query.over == over


@pytest.mark.parametrize("over", ["sum", "max", "mean"])
def test_over_keeps_a_non_finite_layer_visible(over):
    with pytest.raises(AnomalyError):
        _ = series_of(1.0, float("nan"), 3.0).folded(over) <= 1e9


@pytest.mark.parametrize(("reduce_dim", "where"), [(-1, "all"), (-1, {"skip_first": 30}), (-2, "all"), (None, "all")])
def test_several_magnitudes_asked_for_at_once_are_those_asked_for_one_by_one(reduce_dim, where):
    cap = capture(models.llama(), [models.token_batch(2, 33)], sites=[(r"layers\.\d+$", "output")])
    stats = ["top1", "top3", "median", "min2", "min"]
    together = cap.output(r"layers\.\d+$").magnitudes(stats, reduce_dim=reduce_dim, positions=where)
    for stat in stats:
        alone = cap.output(r"layers\.\d+$").magnitude(stat, reduce_dim=reduce_dim, positions=where)
        np.testing.assert_array_equal(together[stat].values, alone.values)
        assert together[stat].query == alone.query
        assert together[stat].problems == alone.problems
