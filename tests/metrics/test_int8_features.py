"""The outlier features of LLM.int8, against the paper's definition written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pytest_qsa import Capture, capture
from pytest_qsa.captures.merging import merge
from pytest_qsa.common.errors import AnomalyError
from pytest_qsa.metrics.selection import NotMeasuredError
from pytest_qsa.suite import ASSERTIONS
from support import models

SUITE_KEYS = {"id": "a", "metric": "int8_outlier_features", "layers": "x", "site": "input", "max": 7}


def outputs(script, threshold=6.0, mask=None):
    """Capture a scripted model's outputs: `script` [layers, samples, tokens, channels]."""
    model = models.Scripted(*(torch.as_tensor(np.asarray(values), dtype=torch.float32) for values in script))
    batch = models.numbered(model)
    batch = batch if mask is None else {"input_ids": batch, "attention_mask": torch.as_tensor(mask)}
    wanted = [("int8_outlier_features", {"abs": threshold})]
    return capture(model, [batch], sites=[(r"layers\.", "output")], statistics=wanted).output("layers")


def features(layers, threshold, layer_share, position_share):
    """`layers`: for each layer all of its tokens [T, C]."""
    hits = [np.abs(x) >= threshold for x in layers]
    in_layers = np.mean([hit.any(axis=0) for hit in hits], axis=0)
    of_tokens = np.concatenate(hits).mean(axis=0)
    return np.sum((in_layers > 0) & (in_layers >= layer_share) & (of_tokens >= position_share))


@settings(max_examples=25, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 8), st.integers(1, 6)),
    shares=st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.06, 0.5, 1.0])),
)
def test_the_count_is_that_of_the_definition(seed, shape, shares):
    rng = np.random.default_rng(seed)
    script = (rng.standard_normal(shape) * rng.uniform(0.5, 12, shape[-1])).astype(np.float32)
    mask = rng.integers(0, 2, shape[1:3])
    mask[:, rng.integers(shape[2])] = 1
    series = outputs(script, mask=mask).int8_outlier_features(layer_share=shares[0], position_share=shares[1])
    assert series.values == [features([x[mask.astype(bool)] for x in script], 6.0, *shares)]
    assert series.layers == [f"whole of {shape[0]} layers"]


def test_the_threshold_itself_counts_and_each_share_is_needed():
    script = np.zeros((4, 1, 100, 3))
    script[0, 0, :24, 0] = -6.0  # 24 of 400 tokens, in one of four layers
    assert outputs(script).int8_outlier_features().values == [1]
    assert outputs(script).int8_outlier_features(position_share=0.061).values == [0]
    assert outputs(script).int8_outlier_features(layer_share=0.26).values == [0]
    assert outputs(script, 6.01).int8_outlier_features(6.01).values == [0]


def test_another_threshold_needs_another_pass():
    with pytest.raises(NotMeasuredError, match="features:5"):
        outputs(np.zeros((2, 1, 3, 4))).int8_outlier_features(5.0)


def test_layers_of_different_widths_have_no_channels_in_common():
    model = models.llama()
    cap = capture(
        model, [models.token_batch(1, 4)], sites=[("(up|down)_proj$", "input")], statistics=["int8_outlier_features"]
    )
    with pytest.raises(AnomalyError, match="not the same number"):
        cap.input("(up|down)_proj$").int8_outlier_features()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_value_is_an_anomaly(poison):
    script = np.zeros((2, 1, 3, 4))
    script[1, 0, 2, 1] = poison
    with pytest.raises(AnomalyError, match="nonfinite says which"):
        _ = outputs(script).int8_outlier_features() <= 7


def test_captures_of_disjoint_samples_add_up_and_survive_the_file(tmp_path):
    script = np.random.default_rng(0).standard_normal((2, 4, 5, 6)) * 5
    merge([outputs(script[:, :1]).capture, outputs(script[:, 1:]).capture]).save(tmp_path / "a.qsa")
    again = Capture.load(tmp_path / "a.qsa").output("layers").int8_outlier_features(layer_share=0.6, position_share=0.2)
    assert again.values == outputs(script).int8_outlier_features(layer_share=0.6, position_share=0.2).values
    assert again.values > 0


def test_a_suite_says_the_shares_beside_its_own_layers_and_takes_no_over():
    assertion_of = ASSERTIONS["int8_outlier_features"]
    assertion = assertion_of(**SUITE_KEYS, layer_share=0.5)
    assert assertion.parameters == {"abs": 6.0, "layer_share": 0.5, "position_share": 0.06}
    with pytest.raises(ValueError, match="takes no over"):
        assertion_of(**SUITE_KEYS, over="sum")
