"""Faults that show past a depth only: a range of positions and `growth` see them, and the whole may not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from pytest_qsa import capture
from pytest_qsa.common.errors import AnomalyError, InfraError
from pytest_qsa.engine.modules import check_context
from support import models

WINDOW, LENGTH = 16, 64


def mistral(window=WINDOW):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


def without_window():
    return mistral(None)


def clamped_positions():
    model = mistral()
    rotary = model.model.rotary_emb
    whole = rotary.forward
    rotary.forward = lambda x, position_ids: whole(x, position_ids.clamp(max=WINDOW - 1))
    return model


def compared(model, samples=2, length=LENGTH, metrics=("kl_divergence",)):
    batches = [models.token_batch(samples, length, seed=3)]
    return capture(model, batches, sites=[("", "logits")], statistics=list(metrics), reference=mistral()).logits()


@pytest.mark.parametrize("fault", [without_window, clamped_positions])
def test_a_fault_past_the_window_shows_at_its_positions_alone(fault):
    found = compared(fault())
    assert found.kl_divergence(positions={"to": WINDOW}).values[0] < 1e-9
    assert found.kl_divergence(positions={"from": WINDOW}).values[0] > 1e-3


def test_growth_is_the_last_quarter_over_the_second():
    found = compared(clamped_positions(), samples=32, length=40)
    scores = found.capture.sites["logits", "logits"].scores[:, 2].reshape(32, 40)
    second, last = scores[:, 10:20], scores[:, 30:]
    want = last.mean() / second.mean()
    (series,) = (found.growth(),)
    np.testing.assert_allclose(series.values, [want])
    low, high, count = next(iter(series.intervals.values()))
    drawn = np.random.default_rng(0).integers(0, 32, (4000, 32))
    spread = np.percentile(last.mean(1)[drawn].mean(1) / second.mean(1)[drawn].mean(1), [2.5, 97.5])
    np.testing.assert_allclose([low, high], spread, rtol=0.1)
    assert count == 32 * 20
    assert want > 1.2


def test_growth_that_means_nothing_is_an_anomaly():
    with pytest.raises(AnomalyError, match=r"2 samples can't show how an error grows: it takes 32"):
        compared(clamped_positions()).growth()
    with pytest.raises(
        AnomalyError, match=r"the KL divergence over the second quarter, 0, is within 3 × what a recast"
    ):
        compared(mistral(), samples=32, length=8).growth()


def test_a_window_longer_than_the_context_is_refused_in_one_line():
    model = mistral()
    model.config.max_position_embeddings = 32
    check_context(model, 32)
    with pytest.raises(
        InfraError, match=r"data\.seq_len 33 is more than the 32 positions that MistralForCausalLM takes"
    ):
        check_context(model, 33)
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    for rope in (yarn, {"full_attention": yarn, "sliding_attention": {"rope_type": "default"}}):
        model.config.rope_parameters = rope
        check_context(model, 128)
