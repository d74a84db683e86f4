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


def without_window(window=WINDOW):
    return mistral(None)


def clamped_positions(window=WINDOW):
    model = mistral(window)
    rotary = model.model.rotary_emb
    whole = rotary.forward
    rotary.forward = lambda x, position_ids: whole(x, position_ids.clamp(max=window - 1))
    return model


def compared(model, samples=2, length=LENGTH, metrics=("kl_divergence",), window=WINDOW):
    batches = [models.token_batch(samples, length, seed=3)]
    reference = mistral(window)
    return capture(model, batches, sites=[("", "logits")], statistics=list(metrics), reference=reference).logits()


@pytest.mark.parametrize(("window", "length"), [(WINDOW, LENGTH), (2048, 2176)])
@pytest.mark.parametrize("fault", [without_window, clamped_positions])
def test_a_fault_past_the_window_shows_at_its_positions_alone(fault, window, length):
    found = compared(fault(window), samples=1, length=length, window=window)
    assert found.kl_divergence(positions={"to": window}).values[0] < 1e-9
    assert found.kl_divergence(positions={"from": window}).values[0] > 1e-3


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


def overlapping(fault, stride, front=(), windows=11, length=WINDOW * 4):
    """Compare on windows of one text that begin `stride` tokens apart, each behind the same first tokens."""
    text = models.token_batch(1, length + stride * (windows - 1), seed=5)[0]
    first = torch.tensor(front, dtype=text.dtype)
    rows = [torch.cat([first, text[at * stride : at * stride + length]]) for at in range(windows)]
    return capture(fault, [row[None] for row in rows], sites=[("", "logits")],
                   statistics=[("growth", {"paired": True})], reference=mistral()).logits()  # fmt: skip


@pytest.mark.parametrize(("stride", "front", "t"), [(32, (), 2.262157), (32, (7, 9), 2.262157), (20, (), 2.306004)])
def test_paired_growth_holds_the_same_tokens_with_less_text_before_them_against_themselves(stride, front, t):
    found = overlapping(clamped_positions(), stride, front)
    scores = found.capture.sites["logits", "logits"].scores[:, 2].reshape(11, -1)
    length, apart = scores.shape[1], 48 // stride
    deep = scores[: 11 - apart, length - length // 4 :]
    near = scores[apart:, length - length // 4 - apart * stride : length - apart * stride]
    (series,) = (found.growth(paired=True),)
    np.testing.assert_allclose(series.values, [deep.sum() / near.sum()])
    low, high, count = next(iter(series.intervals.values()))
    rests = (deep - series.values[0] * near).sum(1) / near.sum()
    pairs = 11 - apart  # t: the tables' 97.5 % quantile of pairs − 1 degrees
    half = t * np.sqrt(pairs / (pairs - 1) * np.square(rests).sum())
    np.testing.assert_allclose([low, high], [series.values[0] - half, series.values[0] + half], rtol=1e-5)
    assert count == deep.size


# At 32 the range begins where the next sample does, which then counts from its first token on.
@pytest.mark.parametrize(("start", "end"), [(40, 56), (32, 60)])
def test_paired_growth_of_a_range_of_positions(start, end):
    found = overlapping(clamped_positions(), 32)
    scores = found.capture.sites["logits", "logits"].scores[:, 2].reshape(11, 64)
    deep, near = scores[:10, start:end], scores[1:, start - 32 : end - 32]
    value = found.growth(paired=True, positions={"from": start, "to": end}).values[0]
    np.testing.assert_allclose(value, deep.sum() / near.sum())


def test_samples_without_common_tokens_have_no_paired_growth():
    batches = [models.token_batch(10, 64, seed=3)]
    apart = capture(clamped_positions(), batches, sites=[("", "logits")],
                    statistics=[("growth", {"paired": True})], reference=mistral()).logits()  # fmt: skip
    with pytest.raises(AnomalyError, match=r"0 samples share the tokens at depth .* takes 8: say data\.stride"):
        apart.growth(paired=True)


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
