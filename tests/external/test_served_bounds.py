"""What the likeliest tokens say of a divergence: bounds, held against the sum over all tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pytest_qsa.common.errors import AnomalyError
from pytest_qsa.external.logprobs import (
    UNLISTED,
    ReferenceRows,
    agreement_of,
    kl_bounds,
    logprob_table,
    nll_bounds,
    rows_of_table,
)

VOCABULARY = 24


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@st.composite
def pairs(draw):
    """Return ln p and ln q of a few positions, near or not, sharp or flat, and how many are told."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.1, 1.0, 4.0, 15.0]))
    apart = draw(st.sampled_from([0.0, 1e-3, 0.1, 3.0]))
    logits = random.normal(size=(5, VOCABULARY)) * scale
    k = draw(st.integers(1, VOCABULARY))
    return log_softmax(logits), log_softmax(logits + random.normal(size=logits.shape) * apart * scale), k


def top_of(q, k):
    """Return what a server tells: the k likeliest of each row, in float32."""
    ids = np.argsort(-q, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(q, ids, axis=1).astype(np.float32).astype(np.float64)


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_the_divergence_lies_between_its_bounds(pair):
    p, q, k = pair
    ids, told = top_of(q, k)
    known = np.take_along_axis(p, ids, axis=1)
    truth = (np.exp(p) * (p - q)).sum(axis=1)
    between = kl_bounds(known, told, (np.exp(p) * p).sum(axis=1), floor=float(q.min()))
    assert (between.low <= truth + 1e-5).all()
    assert (between.high >= truth - 1e-5).all()
    nothing = kl_bounds(known, told, (np.exp(p) * p).sum(axis=1), floor=None)
    np.testing.assert_array_equal(nothing.low, between.low)
    outside = 1 - np.exp(known).sum(axis=1) > 1e-12
    assert np.isinf(nothing.high[outside]).all()


@settings(max_examples=30, deadline=None)
@given(pairs())
def test_the_bounds_meet_where_the_whole_vocabulary_is_told(pair):
    p, q, _ = pair
    ids, told = top_of(q, VOCABULARY)
    truth = (np.exp(p) * (p - q)).sum(axis=1)
    between = kl_bounds(np.take_along_axis(p, ids, axis=1), told, (np.exp(p) * p).sum(axis=1), floor=None)
    np.testing.assert_allclose(between.low, truth, atol=1e-5)
    np.testing.assert_allclose(between.high, truth, atol=1e-5)


def test_the_lower_bound_is_the_divergence_where_the_rest_is_shared_out_alike():
    p = log_softmax(np.random.default_rng(0).normal(size=(4, VOCABULARY)) * 2)
    q = p.copy()
    ids = np.argsort(-p, axis=1)[:, :5]
    for row, top in enumerate(ids):
        q[row, top] += np.linspace(-0.5, 0.1, 5)
        rest = np.setdiff1d(np.arange(VOCABULARY), top)
        q[row, rest] += np.log((1 - np.exp(q[row, top]).sum()) / np.exp(q[row, rest]).sum())
    truth = (np.exp(p) * (p - q)).sum(axis=1)
    told = np.take_along_axis(q, ids, axis=1)
    between = kl_bounds(np.take_along_axis(p, ids, axis=1), told, (np.exp(p) * p).sum(axis=1), floor=None)
    np.testing.assert_allclose(between.low, truth, rtol=1e-4)


def test_more_tokens_never_loosen_the_lower_bound():
    random = np.random.default_rng(1)
    p, q = (log_softmax(random.normal(size=(8, VOCABULARY)) * 3) for _ in range(2))
    lows = []
    for k in range(1, VOCABULARY + 1):
        ids, told = top_of(q, k)
        lows.append(kl_bounds(np.take_along_axis(p, ids, axis=1), told, (np.exp(p) * p).sum(axis=1), None).low)
    assert (np.diff(np.array(lows), axis=0) >= -1e-4).all()


@settings(max_examples=30, deadline=None)
@given(pairs(), st.integers(0, VOCABULARY - 1))
def test_the_likelihood_of_a_token_that_is_not_told_lies_between_its_bounds(pair, token):
    _, q, k = pair
    ids, told = top_of(q, k)
    came = np.where(ids == token, told, np.nan)
    came = np.array([row[~np.isnan(row)][0] if (~np.isnan(row)).any() else np.nan for row in came])
    between = nll_bounds(came, told, floor=float(q.min()))
    assert (between.low <= -q[:, token] + 1e-5).all()
    assert (between.high >= -q[:, token] - 1e-5).all()
    assert np.isinf(nll_bounds(came, told, None).high).tolist() == np.isnan(came).tolist()


def test_a_table_has_the_likeliest_first_and_the_token_that_came():
    table = logprob_table([3, 5, 7], [{5: -1.0, 9: -0.7}, {8: -0.1}], "s")
    assert table.ids.tolist() == [[9, 5], [8, UNLISTED]]
    np.testing.assert_array_equal(table.came, [-1.0, np.nan])
    assert table.least == 1


@pytest.mark.parametrize(
    ("tokens", "rows", "said"),
    [
        ([1, 2, 3], [{2: -1.0}], "s: 2 positions of logprobs for 3 tokens"),
        ([1], [], "s: a sample needs two tokens or more"),
        ([1, 2], [{}], "s: there are no logprobs of position 1"),
        ([1, 2], [{2: float("nan")}], "s: a logprob of position 1 is NaN"),
        ([1, 2], [{2: 11.5, 3: 10.0}], "these are no log-probabilities of one distribution"),
        ([1, 2], [{2: -0.1, 3: -0.1}], "the probabilities of position 1 add up to 1.81"),
    ],
)
def test_what_is_no_distribution_is_told(tokens, rows, said):
    with pytest.raises(AnomalyError) as error:
        logprob_table(tokens, rows, "s")
    assert said in str(error.value)


def test_two_tables_bound_the_divergence_of_their_models():
    random = np.random.default_rng(4)
    p, q = (log_softmax(random.normal(size=(30, VOCABULARY)) * scale) for scale in (2.0, 2.3))
    q = log_softmax(p + 0.3 * q)
    tokens = random.integers(0, VOCABULARY, 31).tolist()
    truth = (np.exp(p) * (p - q)).sum(axis=1)
    told = []
    for logits, k in ((p, 15), (q, 12)):
        ids, values = top_of(logits, k)
        rows = [dict(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(ids, values, strict=True)]
        told.append(logprob_table(tokens, rows, "s"))
    floor = float(q.min())
    found = agreement_of(told[1], rows_of_table(*told), floor=floor, alike=False)
    assert (found.kl.low <= truth + 1e-5).all()
    assert (found.kl.high >= truth - 1e-5).all()
    assert found.kl.low.mean() > 0.6 * truth.mean()
    np.testing.assert_array_equal(found.same_top, (p.argmax(1) == q.argmax(1)).astype(float))
    came = np.array(tokens[1:])
    exact = ~np.isnan(found.reference_nll)
    np.testing.assert_allclose(found.reference_nll[exact], -p[np.arange(30), came][exact], atol=1e-5)


@pytest.mark.parametrize("k", [2, 5, VOCABULARY])
def test_margins_and_overlap_follow_from_the_likeliest_tokens(k):
    random = np.random.default_rng(6)
    p = log_softmax(random.normal(size=(60, VOCABULARY)) * 2.0)
    q = log_softmax(p + 0.8 * random.normal(size=p.shape))
    tokens, at = random.integers(0, VOCABULARY, 61).tolist(), np.arange(60)
    ids, values = top_of(q, k)
    told = [dict(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(ids, values, strict=True)]
    table = logprob_table(tokens, told, "s")
    ordered, top = np.sort(p, axis=1), p.argmax(axis=1)
    known = np.take_along_axis(p, table.ids.astype(int), axis=1)
    rows = ReferenceRows(known, p[at, tokens[1:]], top, (np.exp(p) * p).sum(1), ordered[:, -1] - ordered[:, -2])
    found = agreement_of(table, rows, floor=None, alike=False)
    others = q.copy()
    others[at, top] = -np.inf
    own = q[at, top] - others.max(axis=1)
    np.testing.assert_allclose(found.margins[:, 0], rows.margins)
    np.testing.assert_allclose(np.maximum(found.margins[:, 1], 0), np.maximum(own, 0), atol=1e-5)
    np.testing.assert_array_equal(found.margins[:, 1] < 0, own < 0)
    assert (found.margins[:, 1] >= own - 1e-5).all()
    np.testing.assert_array_equal(found.margins[:, 3], q.argmax(axis=1))
    shared = np.minimum(np.exp(p), np.exp(q)).sum(axis=1)
    assert (found.overlap.low <= shared + 1e-5).all()
    assert (found.overlap.high >= shared - 1e-5).all()
    assert (found.overlap.high - found.overlap.low).mean() < (1e-5 if k == VOCABULARY else 0.5)


def test_one_token_of_a_position_tells_no_margin():
    table = logprob_table([0, 1], [{4: -0.7}], "s")
    rows = ReferenceRows(np.array([[-0.1]]), np.array([-1.0]), np.array([4]), np.array([-0.3]), np.array([0.5]))
    assert agreement_of(table, rows, floor=None, alike=False).margins is None


def test_a_tie_at_the_top_is_no_difference():
    table = logprob_table([0, 1], [{4: -0.7, 5: -0.7}], "s")
    rows = ReferenceRows(np.array([[-0.1, -2.0]]), np.array([-1.0]), np.array([5]), np.array([-0.3]), np.array([0.5]))
    assert agreement_of(table, rows, floor=None, alike=False).same_top.tolist() == [1.0]


@pytest.mark.parametrize(("told", "most"), [([0.5, 0.2], 0.2), ([0.5, 0.4], 0.1)], ids=["the last", "what is left"])
def test_a_token_that_is_not_told_is_no_likelier_than_the_last_nor_than_what_is_left(told, most):
    between = nll_bounds(np.array([np.nan]), np.log([told]), None)
    assert between.low[0] == pytest.approx(-np.log(most), abs=1e-4)
