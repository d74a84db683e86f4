"""Simulated quantization against a plain one of the activations themselves, in numpy float64 and torch's own float8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pytest_qsa import Capture, capture
from pytest_qsa.common.errors import AnomalyError
from pytest_qsa.metrics import decibels
from pytest_qsa.metrics.fidelity import rounded_to
from pytest_qsa.metrics.selection import NotMeasuredError
from support import models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEMES = ("int8", "int4", "fp8_e4m3")
quick = settings(max_examples=25, deadline=None, database=None)


def selection(values, statistics, dtype=torch.float32, mask=None, apart=9):
    model = models.Scripted(torch.as_tensor(np.asarray(values), dtype=dtype))
    batches = [models.numbered(model, i, min(i + apart, len(values))) for i in range(0, len(values), apart)]
    if mask is not None:
        batches = [{"input_ids": batches[0], "attention_mask": torch.as_tensor(mask)}]
    return capture(model, batches, sites=[("0", "output")], statistics=statistics).output("0")


def sqnr(values, scheme="int8", by="tensor", group_size=128, **how):
    parameters = {"scheme": scheme, "by": by, "group_size": group_size}
    chosen = selection(values, [("quantization_sqnr", parameters)], **how)
    return float(chosen.quantization_sqnr(**parameters).values[0])


def on_grid(x, scheme):
    """Round what lies within the grid, by the field's own means."""
    if scheme == "fp8_e4m3":
        return torch.as_tensor(x).float().to(torch.float8_e4m3fn).double().numpy()
    return np.round(x)


def powers(x, scheme, by, group_size):
    """Quantize [T, C] with scales of its own, one group after the other."""
    parts = {
        "tensor": [x],
        "token": list(x),
        "channel": list(x.T),
        "group": [row[i : i + group_size] for row in x for i in range(0, len(row), group_size)],
    }[by]
    signal = error = 0.0
    for part in parts:
        scale = np.abs(part).max() / {"int8": 127, "int4": 7, "fp8_e4m3": 448}[scheme]
        quantized = on_grid(part / scale, scheme) * scale if scale else part
        signal, error = signal + np.sum(part**2), error + np.sum((part - quantized) ** 2)
    return np.array([signal, error])


def expected(samples, scheme, by, group_size=128):
    signal, error = sum(powers(x, scheme, by, group_size) for x in samples)
    return 10 * np.log10(signal / max(error, 1e-300))


def activations(seed, shape, dtype, scale=1.0):
    values = np.random.default_rng(seed).standard_t(3, shape) * scale
    return torch.as_tensor(values).clamp(-60000, 60000).to(DTYPES[dtype]).double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("by", ["token", "channel", "group"])
@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 40)),
    group_size=st.integers(2, 50),
)
def test_scales_of_tokens_channels_and_groups_equal_the_plain_computation(by, scheme, dtype, seed, shape, group_size):
    x = activations(seed, shape, dtype)
    want = 10 ** (-expected(x, scheme, by, group_size) / 20)
    got = 10 ** (-sqnr(x, scheme, by, group_size, dtype=DTYPES[dtype]) / 20)
    assert abs(got - want) < 1e-3 * want + 1e-6  # of noise to signal: x̂ is a float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme", SCHEMES)
@quick
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_one_scale_of_a_16_bit_tensor_is_simulated_exactly_from_the_counts(scheme, dtype, seed, scale):
    x = activations(seed, (2, 20, 16), dtype, scale)
    want = expected([x.reshape(-1, 16)], scheme, "tensor")
    np.testing.assert_allclose(sqnr(x, scheme, dtype=DTYPES[dtype]), want, rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_one_scale_of_a_float32_tensor_is_an_estimate_that_says_so(scheme, seed):
    x = activations(seed, (4, 100, 32), "float32")
    chosen = selection(x, ["quantization_sqnr", "rms"])
    series = chosen.quantization_sqnr(scheme)
    assert abs(series.values[0] - expected([x.reshape(-1, 32)], scheme, "tensor")) < 0.1
    assert "estimated" in str(series.query)
    assert "estimated" not in str(chosen.rms().query)
    assert "estimated" not in str(selection(x, ["quantization_sqnr"], torch.bfloat16).quantization_sqnr(scheme).query)


@quick
@given(values=st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=50))
def test_numbers_are_rounded_to_float8_as_torch_rounds_them(values):
    want = torch.tensor(values).to(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(rounded_to("fp8_e4m3", np.array(values)), want)


def test_halves_are_rounded_to_even_numbers():
    assert rounded_to("int8", np.array([0.5, 1.5, 2.5, -2.5])).tolist() == [0, 2, 2, -2]
    assert rounded_to("fp8_e4m3", np.array([17.0, 19.0])).tolist() == [16, 20]


@pytest.mark.parametrize(("by", "axis"), [("channel", 1), ("token", 1), ("group", None)])
def test_a_weight_has_a_scale_for_each_output_channel_or_group_of_its_inputs(by, axis):
    model = models.llama()
    parameters = {"scheme": "int4", "by": by, "group_size": 16}
    cap = capture(
        model, [models.token_batch(1, 4)], sites=[("down_proj$", "weight")],
        statistics=[("quantization_sqnr", parameters)],
    )  # fmt: skip
    weight = model.model.layers[0].mlp.down_proj.weight.detach().double().numpy()
    want = expected([weight], "int4", "token" if axis else "group", 16)
    np.testing.assert_allclose(cap.weight("down_proj$").quantization_sqnr(**parameters).values[0], want, rtol=1e-4)


@pytest.mark.parametrize("by", ["tensor", "token", "channel", "group"])
def test_batches_change_nothing_and_padding_counts_nowhere(by):
    x = activations(0, (4, 6, 8), "bfloat16")
    assert sqnr(x, by=by, apart=1) == sqnr(x, by=by, apart=4)
    mask = np.ones((4, 6), dtype=int)
    mask[1, 4:] = mask[2, :3] = 0
    padded = np.where(mask[:, :, None] == 1, x, 1e6)
    kept = [row[keep == 1] for row, keep in zip(x, mask, strict=True)]
    want = expected([np.concatenate(kept)] if by == "tensor" else kept, "int8", by)
    np.testing.assert_allclose(sqnr(padded, by=by, mask=mask, dtype=torch.bfloat16), want, rtol=1e-5)


@pytest.mark.parametrize("by", ["tensor", "token", "channel", "group"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tensor_on_the_grid_loses_next_to_nothing_and_one_of_zeros_has_no_number(scheme, by):
    assert sqnr(np.full((1, 4, 8), -2.0), scheme, by) > 120
    assert sqnr(np.where(np.arange(8) < 4, 0.0, 7.0) * np.ones((1, 4, 1)), scheme, by) > 120
    assert np.isnan(sqnr(np.zeros((1, 4, 8)), scheme, by))


@pytest.mark.parametrize("by", ["tensor", "token", "channel", "group"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_value_is_an_anomaly(poison, by):
    x = np.ones((2, 4, 8))
    x[1, 2, 3] = poison
    assert np.isnan(sqnr(x, by=by))


def test_a_finer_scale_loses_less():
    x = np.random.default_rng(0).standard_normal((2, 64, 128)) * np.logspace(-2, 2, 128)
    assert sqnr(x, by="tensor") < sqnr(x, by="token") < sqnr(x, by="group", group_size=16)


def test_a_scheme_that_the_pass_did_not_know_needs_another_pass():
    chosen = selection(np.ones((1, 4, 8)), [("quantization_sqnr", {"by": "token"})])
    for parameters in ({"by": "channel"}, {"by": "token", "scheme": "int4"}, {"by": "tensor"}):
        with pytest.raises(NotMeasuredError, match=r"quantized|counts"):
            chosen.quantization_sqnr(**parameters)


def test_a_site_without_tokens_has_one_scale_only():
    model = models.ConvNet()
    wanted = ["quantization_sqnr", ("quantization_sqnr", {"by": "channel"})]
    cap = capture(model, [torch.randn(2, 3, 8, 8)], sites=[("conv", "output")], statistics=wanted)
    assert cap.output("conv").quantization_sqnr().values[0] > 20
    with pytest.raises(AnomalyError, match="token axis"):
        cap.output("conv").quantization_sqnr(by="channel")


def test_the_sums_survive_the_file(tmp_path):
    chosen = selection(activations(0, (2, 9, 8), "float32"), [("quantization_sqnr", {"by": "token"})])
    chosen.capture.save(tmp_path / "a.qsa")
    again = Capture.load(tmp_path / "a.qsa").output("0").quantization_sqnr(by="token")
    assert again.values == chosen.quantization_sqnr(by="token").values


@pytest.mark.parametrize(("signal", "error", "expected"), [
    (100.0, 1.0, 20.0), (1.0, 0.0, np.inf), (0.0, 1.0, -np.inf), (0.0, 0.0, np.nan),
    (np.nan, 1.0, np.nan), (1.0, np.nan, np.nan), (np.inf, 1.0, np.nan),
])  # fmt: skip
def test_decibels_of_no_error_no_signal_and_neither(signal, error, expected):
    np.testing.assert_equal(decibels(signal, error), expected)
