"""How far two engines that run one checkpoint are apart, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from pytest_qsa.captures import DRAFTS, MOMENTS, OTHER_ENGINE, OTHER_PREDICTIONS, SCORES, TOKENS, Capture, SiteNumbers
from pytest_qsa.common import AnomalyError, SuiteError
from pytest_qsa.metrics import METRICS
from pytest_qsa.suite import load_suite
from support.projects import suite

LENGTHS = (5, 3)
LAYER = "layers.0"


def moments_of(x):
    mean = x.mean()
    return [x.size, mean, ((x - mean) ** 2).sum(), ((x - mean) ** 4).sum(), abs(x).max(), (x == 0).sum(), 0]


def captured(own, other, eager):
    """Return a capture of one layer; each argument has a tensor [T, C] for each of two samples."""
    arrays = {}
    for prefix, samples in (("", own), ("other_", other), ("eager_", eager)):
        arrays[f"{prefix}moments"] = np.array([moments_of(x) for x in samples])
        arrays["token_max" if not prefix else f"{prefix}max"] = np.concatenate([abs(x).max(1) for x in samples]).astype(
            np.float32
        )
    numbers = SiteNumbers(
        "float32", (5, 4), True, frozenset({MOMENTS, TOKENS, OTHER_ENGINE}), np.array([0, 1], np.int32),
        np.zeros(2, np.int32), np.array(LENGTHS), arrays,
    )  # fmt: skip
    return Capture({(LAYER, "output"): numbers}, modules=(LAYER,))


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    return [rng.normal(0, 1, (length, 4)) for length in LENGTHS]


def gap(own, other, eager, **parameters):
    return captured(own, other, eager).output(LAYER).engine_gap(**parameters).values[0]


def scaled(samples, factor):
    return [x * factor for x in samples]


def test_the_gap_of_the_rms_is_the_logarithm_of_the_ratio(samples):
    assert gap(scaled(samples, 1.1), samples, samples, relative=False) == pytest.approx(np.log(1.1))
    pair = [samples[0] * 1.1, samples[1]]
    both = [np.concatenate([x.ravel() for x in side]) for side in (pair, samples)]
    expected = 0.5 * np.log((both[0] ** 2).mean() / (both[1] ** 2).mean())
    assert gap(pair, samples, samples, relative=False) == pytest.approx(expected)
    assert gap(scaled(samples, 0.5), samples, samples, stat="absmax", relative=False) == pytest.approx(np.log(2))


def test_it_is_a_multiple_of_how_far_transformers_own_attentions_are_apart(samples):
    assert gap(scaled(samples, 1.2), samples, scaled(samples, 1.1)) == pytest.approx(np.log(1.2) / np.log(1.1))
    # Where these agree, of what healthy engines stay near.
    assert gap(scaled(samples, 1.01), samples, samples) == pytest.approx(np.log(1.01) / 0.004)


def test_outlier_tokens_are_counted_over_all_samples(samples):
    sharp = [samples[0].copy(), samples[1].copy()]
    sharp[0][2] *= 1e4
    sharp[1][0] *= 1e4
    assert gap(sharp, samples, samples, stat="outlier_tokens", relative=False) == 2
    assert gap(samples, sharp, sharp, stat="outlier_tokens") == 2


def test_the_gap_of_the_predictions_is_their_mean_divergence(tmp_path):
    other, eager = np.array([0.02, 0.04, np.nan]), np.array([0.002, 0.006, np.nan])
    numbers = SiteNumbers(
        "float32", (8,), True, frozenset({SCORES, OTHER_PREDICTIONS}), np.zeros(1, np.int32), np.zeros(1, np.int32),
        np.array([3]), {"scores": np.zeros((3, 4)), "other_kl": other, "eager_kl": eager},
    )  # fmt: skip
    logits = Capture({("logits", "logits"): numbers}).logits()
    assert logits.engine_gap(stat="kl", relative=False).values[0] == pytest.approx(0.03)
    assert logits.engine_gap(stat="kl").values[0] == pytest.approx(0.03 / 0.004)
    with pytest.raises(SuiteError, match="stat: kl is of the predictions"):
        logits.engine_gap()


def test_the_share_of_drafts_that_are_accepted_is_a_ratio_of_sums():
    drafts = np.array([[30.0, 20], [25, 5], [31, 31], [28, 14]])
    numbers = SiteNumbers(
        "float32", (), True, frozenset({DRAFTS}), np.arange(4, dtype=np.int32), np.zeros(4, np.int32), np.full(4, 8),
        {"drafts": drafts},
    )  # fmt: skip
    series = Capture({("logits", "logits"): numbers}).logits().mtp_acceptance()
    share = 70 / 114
    assert series.values[0] == pytest.approx(share)
    [(low, high, count)] = series.intervals.values()
    residuals = drafts[:, 1] - share * drafts[:, 0]
    half = 1.959964 * np.sqrt(4 / 3 * (residuals**2).sum()) / 114
    assert (low, high, count) == (pytest.approx(share - half), pytest.approx(min(1, share + half)), 114)


def test_transformers_drafts_no_token(tmp_path):
    file = tmp_path / "gate.qsa.yaml"
    file.write_text(suite(tmp_path, "id: a, metric: mtp_acceptance, min: 0.6"))
    with pytest.raises(SuiteError, match="transformers drafts none: say"):
        load_suite(file)
    file.write_text(suite(f"{tmp_path}, engine: vllm", "id: a, metric: mtp_acceptance, min: 0.6"))
    load_suite(file)


@pytest.mark.parametrize(
    ("assertion", "message"),
    [
        ("stat: kl", ""),
        ("stat: kl, layers: x", "stat: kl is of the predictions: leave layers"),
        ("stat: kl, site: output, layers: x", "stat: kl is of the predictions"),
        ("stat: rms", "stat: kl is of the predictions, the others are of layers at input or output"),
        ("stat: rms, site: output", "engine_gap at a site is of layers: name them"),
        ("stat: rms, site: output, layers: x", ""),
    ],
)
def test_a_gap_is_of_layers_or_of_the_predictions(tmp_path, assertion, message):
    file = tmp_path / "gate.qsa.yaml"
    file.write_text(suite(f"{tmp_path}, engine: vllm", f"id: a, metric: engine_gap, max: 6, {assertion}"))
    if not message:
        load_suite(file)
        return
    with pytest.raises(SuiteError, match=message):
        load_suite(file)


def test_a_gap_without_a_bound_may_be_six_floors(tmp_path):
    file = tmp_path / "gate.qsa.yaml"

    def stated(text):
        file.write_text(suite(f"{tmp_path}, engine: vllm", f"id: a, metric: engine_gap, layers: x, site: output{text}"))
        return load_suite(file).assertions[0].stated

    assert stated("") == {"max": 6.0}
    assert stated(", max: 3") == {"max": 3.0}
    assert stated(", baseline: {rel: 0.1}") == {}
    with pytest.raises(SuiteError, match="needs a bound or a baseline"):
        stated(", relative: false")


def test_zeros_of_one_engine_alone_are_an_anomaly(samples):
    zeros = [np.zeros_like(x) for x in samples]
    assert gap(zeros, zeros, zeros) == 0
    with pytest.raises(AnomalyError, match="one engine has only zeros"):
        gap(zeros, samples, samples)


def test_some_tokens_alone_are_refused(samples):
    with pytest.raises(SuiteError, match="engine_gap"):
        captured(samples, samples, samples).output(LAYER).engine_gap(positions="no_sink")


def test_one_engine_alone_has_no_gap(tmp_path):
    file = tmp_path / "gate.qsa.yaml"
    file.write_text(suite(tmp_path, "id: gap, metric: engine_gap, layers: x, site: output, max: 6"))
    with pytest.raises(SuiteError, match=r"transformers runs this model: say model\.engine: vllm"):
        load_suite(file)
    assert METRICS["engine_gap"].sites == ("input", "output", "logits")


@pytest.mark.parametrize(
    ("assertion", "message"),
    [
        ("metric: absmax, layers: x, site: weight, max: 6", "say model.weights: files"),
        ("metric: sqnr, layers: x, site: output, min: 6", "record the original with `qsa capture --for-reference`"),
        ("metric: local_sqnr, layers: x, site: output, min: 6", "leave it to a suite without model.engine"),
        ("metric: absmax, layers: x, site: key, max: 6", "site: key is measured where transformers fills its cache"),
    ],
)
def test_what_vllm_cannot_show_is_a_mistake_of_the_suite(tmp_path, assertion, message):
    file = tmp_path / "gate.qsa.yaml"
    text = suite(f"{tmp_path}, engine: vllm, reference: x", f"id: a, {assertion}")
    file.write_text(text)
    with pytest.raises(SuiteError, match=message):
        load_suite(file)
    file.write_text(text.replace("engine: vllm", "engine: vllm, weights: files"))
    if "weight" in assertion:
        load_suite(file)


@pytest.mark.parametrize(
    ("assertion", "message"),
    [
        ("metric: sqnr, min: 6", ""),
        ("metric: cosine, min: 0.9", ""),
        ("metric: new_outliers, max: 2", ""),
        (
            "metric: sqnr, by: token, min: 6",
            "sqnr is of a single token, and two engines round a single one differently",
        ),
        ("metric: max_abs_diff, max: 6", "max_abs_diff is of a single number"),
        ("metric: local_sqnr, min: 6", "local_sqnr runs a layer by itself"),
        ("metric: sqnr, by: channel, min: 6", "by: channel sums up every token"),
    ],
)
def test_sums_over_rows_of_a_recorded_reference_are_measured_in_vllm(tmp_path, assertion, message):
    file = tmp_path / "gate.qsa.yaml"
    file.write_text(
        suite(f"{tmp_path}, engine: vllm, reference: original.qsa", f"id: a, layers: x, site: output, {assertion}")
    )
    if not message:
        load_suite(file)
        return
    with pytest.raises(SuiteError, match=message):
        load_suite(file)
